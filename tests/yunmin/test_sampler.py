"""Sampling: the kernels against a plain reference, each filter against transformers, and all of it at its limits."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from yunmin.errors import RequestError, YunminError
from yunmin.kernels.sampling import choose, log_probabilities
from yunmin.sampler import Sampler, token_logprob
from yunmin.sampling import SamplingParams, sampling_params_from

LARGEST = float(np.finfo(np.float32).max)


def random_logits(seed: int, n: int = 12, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(n, generator=torch.Generator().manual_seed(seed))


def distribution(params: dict[str, Any], logits: Tensor, history: tuple[int, ...] = (), draws: int = 3000) -> Tensor:
    """Shares of the ids drawn."""
    sampler = Sampler(SamplingParams(seed=7, **params), logits.numel(), history)
    counts = torch.zeros(logits.numel(), dtype=torch.float64)
    for _ in range(draws):
        counts[sampler.choose(logits)] += 1
    return counts / draws


def definition(params: dict[str, Any], logits: Tensor, history: tuple[int, ...] = ()) -> Tensor:
    """The probabilities, one token at a time and in words of one syllable."""
    scores = logits.double().tolist()
    penalty = params.get("repetition_penalty", 1.0)
    for token in set(history):
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    scaled = torch.tensor(scores, dtype=torch.float64) / params.get("temperature", 1.0)
    best_first = sorted(range(len(scores)), key=lambda i: -float(scaled[i]))
    top_k = params.get("top_k", 0)
    kept = best_first[:top_k] if top_k else best_first
    weights = {i: float((scaled[i] - scaled.max()).exp()) for i in kept}
    total, mass, nucleus = sum(weights.values()), 0.0, []
    for i in kept:
        if mass < params.get("top_p", 1.0) * total:
            nucleus.append(i)
        mass += weights[i]
    survivors = [i for i in nucleus if weights[i] >= params.get("min_p", 0.0) * weights[best_first[0]]]
    result = torch.zeros(len(scores), dtype=torch.float64)
    for i in survivors:
        result[i] = weights[i]
    return result / result.sum()


def adjusted(row: NDArray[np.float32], params: SamplingParams, prompt: list[int], generated: list[int]) -> list[float]:
    """Scores after bias and penalties, one token at a time."""

    def rounded(score: float) -> float:
        return float(np.float32(min(max(score, -LARGEST), LARGEST)))

    scores = [float(score) for score in row]
    for token_id, bias in params.logit_bias:
        scores[token_id] = rounded(scores[token_id] + bias)
    seen = {*prompt, *generated} if params.repetition_penalty != 1 else set(generated)
    for token_id in seen:
        score, penalty, count = scores[token_id], params.repetition_penalty, generated.count(token_id)
        score = score / penalty if score > 0 else score * penalty
        score -= params.frequency_penalty * count + (params.presence_penalty if count else 0.0)
        scores[token_id] = rounded(score)
    return scores


def reference(scores: list[float], params: SamplingParams, draw: float, allowed: set[int] | None = None) -> int:
    """The token chosen, by sorting everything."""
    ids = sorted(allowed if allowed is not None else range(len(scores)), key=lambda i: (-scores[i], i))
    best = scores[ids[0]]
    if params.temperature == 0:
        return ids[0]
    kept = ids[: params.top_k] if params.top_k else ids
    distances = np.array([scores[i] - best for i in kept])
    with np.errstate(over="ignore"):
        weights = np.exp(distances / params.temperature)
    if params.top_p < 1:
        before = np.cumsum(weights) - weights
        kept = [i for i, mass in zip(kept, before, strict=True) if mass < params.top_p * weights.sum()]
    if params.min_p > 0:
        kept = [i for i in kept if scores[i] >= best + params.temperature * np.log(params.min_p)]
    by_id = sorted(zip(kept, weights, strict=False))
    cumulative = np.cumsum([weight for _, weight in by_id])
    place = int(np.searchsorted(cumulative, draw * cumulative[-1], side="right"))
    return by_id[min(place, max(n for n, (_, weight) in enumerate(by_id) if weight))][0]


def first_draw(seed: int) -> float:
    return torch.rand(1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).item()


def random_row(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """Logits of one of many shapes: flat, peaked, far apart, close together, equal, with outliers."""
    spread = rng.choice([1e-6, 0.01, 1.0, 3.0, 50.0])
    row = rng.standard_normal(size) * spread
    kind = rng.integers(7)
    if kind == 0:
        row = rng.integers(-2, 3, size) * spread  # nearly all of them equal to others
    elif kind == 1:
        row = np.full(size, spread)
    elif kind == 2:
        row[rng.integers(size, size=3)] += rng.uniform(0, 30, 3)
    elif kind == 3:
        row[rng.integers(size, size=3)] = rng.choice([LARGEST, -LARGEST, 1e30, -1e-40], 3)
    elif kind == 4:
        row = -np.exp(rng.uniform(-60, 60, size))
    elif kind == 5:
        row = np.sort(row)[:: rng.choice([-1, 1])]
    return np.clip(row, -LARGEST, LARGEST).astype(np.float32)


def random_params(rng: np.random.Generator, size: int) -> dict[str, Any]:
    values: dict[str, Any] = {"temperature": float(rng.choice([0.0, 1e-3, 0.7, 1.0, 1.0, 1.0, 2.5, 100.0]))}
    if rng.random() < 0.5:
        values["top_k"] = int(rng.choice([1, 2, 7, 40, size // 2, size - 1, size, size + 1, 10**12]))
    if rng.random() < 0.5:
        values["top_p"] = float(rng.choice([1e-12, 0.1, 0.5, 0.9, 0.95, 0.999, rng.random() + 1e-9]))
    if rng.random() < 0.3:
        values["min_p"] = float(rng.choice([1e-9, 0.05, 0.5, 1.0, rng.random()]))
    if rng.random() < 0.2:
        values["repetition_penalty"] = float(rng.choice([0.5, 1.3, 100.0]))
    if rng.random() < 0.2:
        values["presence_penalty"] = float(rng.uniform(-2, 2))
    if rng.random() < 0.2:
        values["frequency_penalty"] = float(rng.uniform(-2, 2))
    if rng.random() < 0.2:
        ids = rng.choice(size, min(size, 3), replace=False)
        values["logit_bias"] = tuple((int(i), float(rng.uniform(-100, 100))) for i in ids)
    return values


def bits(allowed: set[int], size: int) -> NDArray[np.uint32]:
    mask = np.zeros(-(-size // 32), np.uint32)
    for i in allowed:
        mask[i // 32] |= np.uint32(1 << i % 32)
    return mask


PARAMS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 4},
    {"top_k": 500},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"top_p": 1e-9},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.6},
    {"temperature": 0.8, "top_k": 7, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("seed", range(20))
def test_the_kernel_chooses_what_the_plain_reference_chooses(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for case in range(200):
        size = int(rng.choice([1, 2, 7, 16, 31, 65, 255, 256, 257, 700, 2000]))
        row, values = random_row(rng, size), random_params(rng, size)
        params = SamplingParams(seed=case, **values)
        prompt, generated = (rng.integers(size, size=rng.integers(5)).tolist() for _ in range(2))
        padded = np.concatenate([row, np.full(rng.integers(40), 1e9, np.float32)])
        allowed = None if rng.random() < 0.7 else set(rng.integers(size, size=rng.integers(1, size + 1)).tolist())
        sampler = Sampler(params, size, prompt)
        for token_id in generated:
            sampler.record(token_id)
        chosen = sampler.choose(torch.from_numpy(padded), None if allowed is None else bits(allowed, size))
        scores = adjusted(row, params, prompt, generated)
        assert chosen == reference(scores, params, first_draw(case), allowed), (size, values, allowed)


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 40}, {"top_k": 20000, "top_p": 0.8}, {"top_p": 0.9}, {"min_p": 0.01}]
)
def test_a_whole_vocabulary_is_sampled_as_by_the_plain_reference(options: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    for seed, spread in enumerate([0.1, 1.0, 2.0, 8.0]):
        row = (rng.standard_normal(50280) * spread).astype(np.float32)
        row[rng.integers(row.size, size=9)] += rng.uniform(0, 12, 9).astype(np.float32)
        for temperature in (0.0, 0.7, 1.0):
            params = SamplingParams(seed=seed, temperature=temperature, **options)
            chosen = Sampler(params, row.size).choose(torch.from_numpy(row))
            assert chosen == reference(row.astype(float).tolist(), params, first_draw(seed))


def test_draws_at_the_ends_of_the_unit_interval_choose_the_first_and_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(2, 700)
    for draw, expected in ((0.0, 0), (1 - 2**-53, 699)):
        monkeypatch.setattr(torch, "rand", lambda *_, draw=draw, **__: torch.tensor([draw], dtype=torch.float64))
        assert Sampler(SamplingParams(), 700).choose(logits) == expected


def test_threads_do_not_share_memory() -> None:
    logits = random_logits(3, 5000)
    expected = [Sampler(SamplingParams(seed=s, top_p=0.9), 5000).choose(logits) for s in range(40)]
    results: dict[int, list[int]] = {}

    def work(n: int) -> None:
        results[n] = [Sampler(SamplingParams(seed=s, top_p=0.9), 5000).choose(logits) for s in range(40)]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[n] for n in range(4)] == [expected] * 4


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_draws_follow_the_definition(params: dict[str, Any]) -> None:
    logits, history = random_logits(3), (0, 5, 5, 7)
    expected = definition(params, logits, history)
    shares = distribution(params, logits, history)
    assert not shares[expected == 0].any()
    # five standard deviations of a share over 3000 draws
    assert ((shares - expected).abs() <= 5 * (expected * (1 - expected) / 3000).sqrt() + 1e-12).all()


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_the_same_tokens_survive_as_in_transformers(params: dict[str, Any]) -> None:
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    processors = LogitsProcessorList()
    if "repetition_penalty" in params:
        processors.append(RepetitionPenaltyLogitsProcessor(params["repetition_penalty"]))
    if "temperature" in params:
        processors.append(TemperatureLogitsWarper(params["temperature"]))
    if "top_k" in params:
        processors.append(TopKLogitsWarper(params["top_k"]))
    if "top_p" in params:
        processors.append(TopPLogitsWarper(params["top_p"]))
    if "min_p" in params:
        processors.append(MinPLogitsWarper(params["min_p"]))
    for seed in range(10):
        logits, history = random_logits(seed), (1, 4, 9)
        theirs = torch.softmax(processors(torch.tensor([history]), logits[None].clone()), -1)[0].double()
        torch.testing.assert_close(definition(params, logits, history), theirs, rtol=0, atol=1e-6)


def test_temperature_zero_takes_the_best_after_the_penalty() -> None:
    logits = torch.tensor([1.0, 3.0, 2.9, -1.0])
    assert Sampler(SamplingParams(temperature=0), 4).choose(logits) == 1
    assert Sampler(SamplingParams(temperature=0, repetition_penalty=2.0), 4, [1]).choose(logits) == 2
    assert Sampler(SamplingParams(temperature=0, logit_bias=((1, -1.0),)), 4).choose(logits) == 2


def test_presence_and_frequency_count_what_was_generated_and_not_the_prompt() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 0.0])
    presence, frequency = ({"presence_penalty": 1.5}, 1), ({"frequency_penalty": 0.6}, 2)
    for options, needed in (presence, frequency):
        sampler = Sampler(sampling_params_from({"temperature": 0, **options}), 4, [1, 1, 1, 1])
        for _ in range(needed):
            assert sampler.choose(logits) == 1
            sampler.record(1)
        assert sampler.choose(logits) == 2


def test_penalties_follow_many_distinct_tokens() -> None:
    sampler = Sampler(SamplingParams(temperature=0, presence_penalty=2.0), 1000)
    for expected in range(1000):
        assert sampler.choose(torch.zeros(1000)) == expected
        sampler.record(expected)


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-3, 100.0])
def test_extreme_temperatures_neither_overflow_nor_fail(temperature: float) -> None:
    logits = torch.tensor([3e38, -3e38, 0.0, 2.9e38])
    sampler = Sampler(SamplingParams(temperature=temperature, seed=1), 4)
    assert {sampler.choose(logits) for _ in range(20)} == {0}
    flat = Sampler(SamplingParams(temperature=temperature, seed=1), 4)
    assert len({flat.choose(torch.zeros(4)) for _ in range(60)}) == 4


def test_penalties_of_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([LARGEST, -LARGEST, 0.0])
    options: dict[str, Any] = {"repetition_penalty": 0.01, "logit_bias": ((0, 100.0), (1, -100.0))}
    for temperature in (0.0, 1.0):
        assert Sampler(SamplingParams(temperature=temperature, **options), 3, [0, 1]).choose(logits) == 0


def test_padding_ids_are_never_chosen() -> None:
    logits = torch.zeros(10)
    logits[7:] = 1000.0
    for params in (SamplingParams(temperature=0), SamplingParams(seed=0), SamplingParams(seed=0, top_k=50)):
        sampler = Sampler(params, 7)
        assert all(sampler.choose(logits) < 7 for _ in range(50))


def test_a_mask_that_allows_nothing_is_an_error() -> None:
    with pytest.raises(YunminError, match="allows none"):
        Sampler(SamplingParams(), 7).choose(torch.zeros(10), np.array([0xFFFFFF80], np.uint32))


def test_a_seed_repeats_and_a_saved_state_continues() -> None:
    logits = random_logits(0, 50)

    def draw(sampler: Sampler, n: int) -> list[int]:
        return [sampler.choose(logits) for _ in range(n)]

    params = SamplingParams(seed=2**63 - 1)
    first, second = Sampler(params, 50), Sampler(params, 50)
    assert draw(first, 20) == (whole := draw(second, 20))
    third = Sampler(params, 50)
    head = draw(third, 8)
    assert head + draw(Sampler(params, 50, (), third.state()), 12) == whole
    assert draw(Sampler(SamplingParams(seed=1), 50), 20) != whole
    unseeded = SamplingParams()
    assert draw(Sampler(unseeded, 50), 20) != draw(Sampler(unseeded, 50), 20)


def test_a_sequences_draws_do_not_touch_the_global_generator() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Sampler(SamplingParams(seed=1), 5).choose(torch.zeros(5))
    assert torch.equal(before, torch.get_rng_state())


def test_the_logits_are_not_modified() -> None:
    logits = random_logits(1, 40)
    before = logits.clone()
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=1.0, logit_bias=((3, 5.0),), top_k=3)
    Sampler(params, 40, [1, 2]).choose(logits, bits({1, 2, 3}, 40))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("size", "place"), [(3, 1), (700, 0), (700, 300), (700, 699)])
def test_logits_that_are_not_finite_are_an_error(bad: float, temperature: float, size: int, place: int) -> None:
    logits = torch.zeros(size)
    logits[place] = bad
    with pytest.raises(YunminError, match="not finite"):
        Sampler(SamplingParams(temperature=temperature), size).choose(logits)
    with pytest.raises(YunminError, match="not finite"):
        token_logprob(logits, size, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_dtype_is_sampled(dtype: torch.dtype) -> None:
    assert Sampler(SamplingParams(temperature=0), 3).choose(torch.tensor([0, 2, 1], dtype=dtype)) == 1


def test_a_row_of_any_stride_is_sampled() -> None:
    logits = random_logits(4, 600).reshape(300, 2)
    for column in range(2):
        assert Sampler(SamplingParams(temperature=0), 300).choose(logits[:, column]) == logits[:, column].argmax()


def test_one_compiled_kernel_serves_every_request() -> None:
    rng = np.random.default_rng(5)
    for size in (3, 300):
        for logits in (torch.zeros(size), torch.zeros(size, dtype=torch.bfloat16), torch.zeros(size, 2)[:, 0]):
            for mask in (None, bits({1}, size)):
                Sampler(SamplingParams(**random_params(rng, size)), size, [1]).choose(logits, mask)
                token_logprob(logits, size, 0, 2)
    with torch.inference_mode():
        Sampler(SamplingParams(temperature=1, top_k=10**30, logit_bias=((1, 1),)), 3).choose(torch.zeros(2, 3)[1])
    assert len(choose.signatures) == len(log_probabilities.signatures) == 1


@pytest.mark.parametrize("size", [1, 5, 300, 5000])
@pytest.mark.parametrize("alternatives", [0, 1, 5, 20])
def test_logprobs_are_the_log_softmax_of_what_is_no_padding(size: int, alternatives: int) -> None:
    logits = torch.cat([random_logits(size, size, spread=4.0), torch.full((3,), 99.0)])
    expected = torch.log_softmax(logits[:size].double(), 0)
    found = token_logprob(logits, size, size // 2, alternatives)
    assert found.logprob == pytest.approx(expected[size // 2].item(), abs=1e-12)
    values, ids = expected.sort(descending=True)
    count = min(alternatives, size)
    assert [i for i, _ in found.top] == ids[:count].tolist()
    assert [v for _, v in found.top] == pytest.approx(values[:count].tolist(), abs=1e-12)


def test_alternatives_with_equal_logits_come_in_order_of_their_ids() -> None:
    found = token_logprob(torch.tensor([0.0, 1, 1, 0, 1] * 100), 500, 0, 4)
    assert [i for i, _ in found.top] == [1, 2, 4, 6]


def test_a_bias_for_an_id_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(RequestError, match=r"logit_bias: token ids must lie in 0\.\.6, got 7"):
        Sampler(SamplingParams(logit_bias=((7, 1.0),)), 7)
