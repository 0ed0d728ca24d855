"""Sampling parameters: what a request may say, and how what it may not is named."""

from __future__ import annotations

import pytest

from yunmin.errors import RequestError
from yunmin.sampling import SamplingParams, sampling_params_from

IMPOSSIBLE: dict[str, list[object]] = {
    "max_tokens": [-1, 1.5, "3", True],
    "temperature": [-0.1, 101, float("nan"), float("inf"), "hot", True, 10**400],
    "top_k": [-1, 1.0, "all", False],
    "top_p": [0, -0.5, 1.1, float("nan"), "x"],
    "min_p": [-0.1, 1.5, float("nan"), []],
    "repetition_penalty": [0, -1, 1e9, float("nan"), {}],
    "seed": [-1, 1.5, 2**63, "a", True],
    "stop": [[""], [1], 5, ["x"] * 17, ["x" * 257], [None]],
    "stop_token_ids": [5, "5", ["5"], [-1], [1.0], [True], [1] * 129],
    "ignore_eos": [1, "true"],
    "presence_penalty": [2.1, -2.1, float("nan"), "x"],
    "frequency_penalty": [2.1, -2.1, float("inf"), True],
    "logit_bias": [
        5,
        "5",
        {"a": 1},
        {"-1": 1},
        {1: 101},
        {1: float("nan")},
        {1: "x"},
        {1.5: 1},
        [[1]],
        [1],
        [[1, 2, 3]],
        [[1, 2], [1, 3]],
        dict.fromkeys(range(1025), 1),
        {"1" * 5000: 1},
    ],
    "logprobs": [-1, 21, 1.5, True],
    "constraint": ["[0-9]+", {"type": "object"}],
}


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


def test_biases_and_stop_ids_are_read_as_json_gives_them() -> None:
    expected = ((5, -100), (6, 1.5))
    for given in ({"5": -100, "6": 1.5}, {5: -100, 6: 1.5}, [[5, -100], [6, 1.5]], [("5", -100), (6, 1.5)]):
        assert sampling_params_from({"logit_bias": given}).logit_bias == expected
    assert sampling_params_from({"stop_token_ids": [3, 4]}).stop_token_ids == (3, 4)
