"""Rounding to nearest, and its error."""

from __future__ import annotations

import pytest
import torch

from yunmin.errors import CheckpointError
from yunmin.quantization.layout import Quantization
from yunmin.quantization.rounding import relative_error, round_tensors, round_weight


def _weight(rows: int, inputs: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("inputs", [1, 31, 32, 70])
def test_int8_error_is_at_most_half_a_level_of_the_largest_weight_of_the_row(inputs: int) -> None:
    weight = _weight(9, inputs)
    error = (round_weight(weight, "int8").dequantized() - weight).abs()
    bound = weight.abs().amax(1, keepdim=True) / 127 / 2
    assert bool((error <= bound * (1 + 1e-5)).all())


@pytest.mark.parametrize("inputs", [1, 31, 32, 70])
def test_int4_error_is_at_most_that_of_the_largest_weight_over_seven(inputs: int) -> None:
    weight = _weight(9, inputs)
    quantized = round_weight(weight, "int4")
    for group, first in enumerate(range(0, inputs, 32)):
        columns = weight[:, first : first + 32]
        scale = columns.abs().amax(1, keepdim=True) / 7
        plain = ((columns / scale).round() * scale - columns).square().sum(1)
        error = (quantized.dequantized()[:, first : first + 32] - columns).square().sum(1)
        # one of the candidates is the plain scale, rounded to float16
        assert bool((error <= plain * 1.02 + 2e-5 * columns.shape[1] * scale[:, 0].square()).all()), group


def test_int4_uses_all_sixteen_levels() -> None:
    levels = round_weight(_weight(64, 64), "int4").levels
    assert sorted(set(levels.flatten().tolist())) == list(range(-8, 8))


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
def test_what_has_the_form_of_levels_is_kept_exactly(weight_format: str) -> None:
    limit = 127 if weight_format == "int8" else 7
    levels = torch.randint(-limit, limit + 1, (8, 64), generator=torch.Generator().manual_seed(1)).float()
    levels[:, ::32] = limit
    weight = levels * 0.25
    assert torch.equal(round_weight(weight, weight_format).dequantized(), weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
def test_zeros_stay_zeros(weight_format: str) -> None:
    weight = _weight(4, 64)
    weight[1] = 0.0
    quantized = round_weight(weight, weight_format)  # type: ignore[arg-type]
    assert torch.equal(quantized.dequantized()[1], torch.zeros(64))
    assert bool((quantized.scale[1] == 0).all())


def test_importance_moves_the_error_to_where_it_matters_less() -> None:
    weight = _weight(256, 32)
    importance = torch.ones(32)
    importance[:4] = 100.0
    plain, weighted = (round_weight(weight, "int4", h).dequantized() for h in (None, importance))
    assert relative_error(weight, weighted, importance) < relative_error(weight, plain, importance)
    assert relative_error(weight, plain) < relative_error(weight, weighted)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e6])
def test_weights_that_integers_cannot_stand_for_are_refused_by_name(bad: float) -> None:
    weight = _weight(4, 8)
    weight[2, 3] = bad
    name = "backbone.layers.0.mixer.in_proj.weight"
    with pytest.raises(CheckpointError, match=f"{name}: to be quantized, magnitudes must be at most"):
        round_tensors({name: weight}, Quantization("int4"))
