"""Perplexity scores each token once, with at least the context it promises."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.models import random_ids, random_model
from yunmin.errors import DataError
from yunmin.perplexity import perplexity


@pytest.mark.parametrize(("window", "stride"), [(7, 7), (7, 3), (7, 1), (64, 64), (30, 29), (1, 1), (500, 500)])
@pytest.mark.parametrize("n", [2, 8, 9, 50])
def test_it_equals_scoring_each_token_by_itself(window: int, stride: int, n: int) -> None:
    model = random_model(dtype=torch.float64)
    ids = random_ids(model.config, 1, n)[0]
    spans: list[tuple[int, int]] = []

    def forward(batch: Tensor) -> Tensor:
        assert batch.shape[1] <= window
        spans.append((batch.shape[0], batch.shape[1]))
        return model(batch)

    measured = perplexity(forward, ids, window=window, stride=stride, batch_size=3)
    total, begin_scored, end = 0.0, 0, min(window, n - 1)
    while begin_scored < n - 1:
        context = ids[max(0, end - window) : end]
        with torch.no_grad():
            logs = torch.log_softmax(model(context[None])[0].float(), -1).double()
        for target in range(begin_scored, end):
            total -= float(logs[target - max(0, end - window), ids[target + 1]])
        begin_scored, end = end, min(end + stride, n - 1)
    assert measured.tokens == n - 1
    assert measured.mean_nll == pytest.approx(total / (n - 1), rel=1e-5)
    assert measured.token_perplexity == pytest.approx(math.exp(total / (n - 1)), rel=1e-4)
    assert (measured.window, measured.stride) == (window, stride)


def test_uniform_logits_have_the_vocabulary_as_perplexity() -> None:
    measured = perplexity(lambda x: torch.zeros(*x.shape, 37), list(range(30)), window=4, stride=2)
    assert measured.token_perplexity == pytest.approx(37)


def test_hopeless_logits_overflow_to_infinity_not_to_an_error() -> None:
    def forward(x: Tensor) -> Tensor:
        return torch.full((*x.shape, 3), 0.0).index_fill(2, torch.tensor([0]), 5000.0)

    assert perplexity(forward, [1, 2, 1, 2]).token_perplexity == math.inf


def test_progress_counts_windows() -> None:
    calls: list[tuple[int, int]] = []
    perplexity(
        lambda x: torch.zeros(*x.shape, 5), [1] * 21, window=4, stride=4, progress=lambda a, b: calls.append((a, b))
    )
    assert calls[-1] == (5, 5)


@pytest.mark.parametrize(("ids", "window", "stride"), [([1], 4, 4), ([], 4, 4), ([1, 2], 4, 5), ([1, 2], 4, 0)])
def test_impossible_arguments_are_refused(ids: list[int], window: int, stride: int) -> None:
    with pytest.raises(DataError):
        perplexity(lambda x: torch.zeros(*x.shape, 5), ids, window=window, stride=stride)
