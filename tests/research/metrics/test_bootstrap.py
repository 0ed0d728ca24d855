"""Intervals by the bootstrap."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from research.metrics import bootstrap
from research.metrics.bootstrap import bootstrap_interval, ratio_interval
from yunmin.errors import DataError


def test_it_is_the_percentile_interval_of_all_resamples_of_a_small_sample() -> None:
    values = [0.0, 1.0, 5.0, 2.0]
    every = [float(np.mean(drawn)) for drawn in itertools.product(values, repeat=4)]
    low, high = bootstrap_interval(values, samples=40_000, confidence=0.8)
    assert low == pytest.approx(np.quantile(every, 0.1), abs=0.26)  # means are multiples of a quarter
    assert high == pytest.approx(np.quantile(every, 0.9), abs=0.26)


def test_it_comes_near_the_normal_interval_of_a_large_sample() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 2000)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / np.sqrt(values.size)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_it_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        low, high = bootstrap_interval(rng.exponential(1.0, 60), samples=400)
        covered += low <= 1.0 <= high
    assert 0.88 <= covered / 200 <= 0.98  # 95 %, less a little for a skewed distribution


def test_the_seed_alone_decides_whatever_is_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(3).random(50)
    whole = bootstrap_interval(values, samples=300, seed=4)
    assert bootstrap_interval(values, samples=300, seed=4) == whole
    assert bootstrap_interval(values, samples=300, seed=5) != whole
    monkeypatch.setattr(bootstrap, "_AT_ONCE", 120)
    assert bootstrap_interval(values, samples=300, seed=4) == whole


def test_a_ratio_draws_both_together() -> None:
    tokens = np.random.default_rng(5).integers(1, 100, 200)
    assert ratio_interval(2.0 * tokens, tokens) == (2.0, 2.0)
    nll = tokens * np.random.default_rng(6).normal(3.0, 0.5, 200)
    low, high = ratio_interval(nll, tokens)
    assert low < nll.sum() / tokens.sum() < high
    assert ratio_interval(nll, np.ones(200)) == pytest.approx(bootstrap_interval(nll))


def test_one_value_is_its_own_interval() -> None:
    assert bootstrap_interval([0.25]) == (0.25, 0.25)


def test_impossible_input_is_refused() -> None:
    for values in ([], [[1.0]], [1.0, float("nan")], [float("inf")]):
        with pytest.raises(DataError, match="bootstrap: expected"):
            bootstrap_interval(values)
    with pytest.raises(DataError, match="above 0"):
        ratio_interval([1.0], [0.0])
    with pytest.raises(DataError, match="equal length"):
        ratio_interval([1.0, 2.0], [1.0])
    with pytest.raises(DataError, match="confidence"):
        bootstrap_interval([1.0], confidence=95)
    with pytest.raises(DataError, match="sample"):
        bootstrap_interval([1.0], samples=0)
