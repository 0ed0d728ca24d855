"""Sampling: each filter against its definition, against transformers, and at its limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from yunmin.errors import RequestError, YunminError
from yunmin.sampling import Sampler, SamplingParams, sampling_params_from


def random_logits(seed: int, n: int = 12, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(n, generator=torch.Generator().manual_seed(seed))


def distribution(params: dict[str, Any], logits: Tensor, history: tuple[int, ...] = (), draws: int = 3000) -> Tensor:
    """Shares of the ids drawn."""
    sampler = Sampler(SamplingParams(seed=7, **params), logits.numel())
    counts = torch.zeros(logits.numel(), dtype=torch.float64)
    for _ in range(draws):
        counts[sampler.choose(logits, history)] += 1
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


IMPOSSIBLE: dict[str, list[object]] = {
    "max_tokens": [0, -1, 1.5, "3", True],
    "temperature": [-0.1, 101, float("nan"), float("inf"), "hot", True, 10**400],
    "top_k": [-1, 1.0, "all", False],
    "top_p": [0, -0.5, 1.1, float("nan"), "x"],
    "min_p": [-0.1, 1.5, float("nan"), []],
    "repetition_penalty": [0, -1, 1e9, float("nan"), {}],
    "seed": [-1, 1.5, 2**63, "a", True],
    "stop": [[""], [1], 5, ["x"] * 17, ["x" * 257], [None]],
}


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
    assert Sampler(SamplingParams(temperature=0), 4).choose(logits, []) == 1
    assert Sampler(SamplingParams(temperature=0, repetition_penalty=2.0), 4).choose(logits, [1]) == 2


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-3, 100.0])
def test_extreme_temperatures_neither_overflow_nor_fail(temperature: float) -> None:
    logits = torch.tensor([3e38, -3e38, 0.0, 2.9e38])
    sampler = Sampler(SamplingParams(temperature=temperature, seed=1), 4)
    assert {sampler.choose(logits, []) for _ in range(20)} == {0}
    flat = Sampler(SamplingParams(temperature=temperature, seed=1), 4)
    assert len({flat.choose(torch.zeros(4), []) for _ in range(60)}) == 4


def test_padding_ids_are_never_chosen() -> None:
    logits = torch.zeros(10)
    logits[7:] = 1000.0
    for params in (SamplingParams(temperature=0), SamplingParams(seed=0), SamplingParams(seed=0, top_k=50)):
        sampler = Sampler(params, 7)
        assert all(sampler.choose(logits, []) < 7 for _ in range(50))


def test_a_seed_repeats_and_a_saved_state_continues() -> None:
    logits = random_logits(0, 50)

    def draw(sampler: Sampler, n: int) -> list[int]:
        return [sampler.choose(logits, []) for _ in range(n)]

    params = SamplingParams(seed=2**63 - 1)
    first, second = Sampler(params, 50), Sampler(params, 50)
    assert draw(first, 20) == (whole := draw(second, 20))
    third = Sampler(params, 50)
    head = draw(third, 8)
    assert head + draw(Sampler(params, 50, third.state()), 12) == whole
    assert draw(Sampler(SamplingParams(seed=1), 50), 20) != whole
    unseeded = SamplingParams()
    assert draw(Sampler(unseeded, 50), 20) != draw(Sampler(unseeded, 50), 20)


def test_a_sequences_draws_do_not_touch_the_global_generator() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Sampler(SamplingParams(seed=1), 5).choose(torch.zeros(5), [])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(bad: float, temperature: float) -> None:
    with pytest.raises(YunminError, match="not finite"):
        Sampler(SamplingParams(temperature=temperature), 3).choose(torch.tensor([0.0, bad, 1.0]), [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_dtype_is_sampled(dtype: torch.dtype) -> None:
    assert Sampler(SamplingParams(temperature=0), 3).choose(torch.tensor([0, 2, 1], dtype=dtype), []) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in IMPOSSIBLE.items() for value in values],
    ids=str,
)
def test_an_impossible_value_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(RequestError) as caught:
        sampling_params_from({field: value})
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")
    assert "\n" not in str(caught.value)


def test_an_unknown_field_is_refused_by_name() -> None:
    with pytest.raises(RequestError, match="temprature: "):
        sampling_params_from({"temprature": 0.5})


def test_none_means_the_default_and_one_stop_string_is_a_list() -> None:
    assert sampling_params_from({"temperature": None, "seed": None}) == SamplingParams()
    assert sampling_params_from({"stop": "ab"}).stop == ("ab",)
    assert sampling_params_from({"stop": ["ab", "c"]}).stop == ("ab", "c")
