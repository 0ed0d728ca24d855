"""Calibrated rounding lowers the error on the inputs it was calibrated on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from export.calibration import calibrated_tensors
from export.gptq import gptq
from tests.models import random_ids, random_tensors, small_config
from yunmin.errors import CheckpointError
from yunmin.quantization.layout import Quantization
from yunmin.quantization.rounding import round_tensors, round_weight


def hessian_error(weight: Tensor, approximation: Tensor, hessian: Tensor) -> float:
    """Mean squared error of W x over the inputs that gave the Hessian, relative to the mean square of W x."""
    hessian = hessian.double()
    error, weight = (approximation - weight).double(), weight.double()
    return float(((error @ hessian) * error).sum() / ((weight @ hessian) * weight).sum())


def _correlated(tokens: int, inputs: int, seed: int = 0) -> Tensor:
    """Inputs of which a few directions explain most."""
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(max(1, inputs // 4), inputs, generator=rng)
    hidden = torch.randn(tokens, mixing.shape[0], generator=rng)
    return hidden @ mixing + 0.3 * torch.randn(tokens, inputs, generator=rng)


def _weight(rows: int, inputs: int) -> Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("inputs", [7, 32, 33, 100, 128])
def test_gptq_lowers_the_error_on_correlated_inputs(inputs: int) -> None:
    weight, (x, unseen) = _weight(24, inputs), _correlated(2500, inputs).split([2000, 500])
    hessian = (x.T @ x).double() / 2000
    nearest, calibrated = round_weight(weight, "int4"), gptq(weight, hessian)
    error = hessian_error(weight, calibrated.dequantized(), hessian)
    assert error < 0.8 * hessian_error(weight, nearest.dequantized(), hessian)
    on_outputs = (unseen @ (calibrated.dequantized() - weight).T).square().mean()
    assert float(on_outputs) < float((unseen @ (nearest.dequantized() - weight).T).square().mean())


def test_hessian_error_is_the_error_of_the_outputs() -> None:
    weight, x = _weight(8, 40), _correlated(300, 40)
    approximation = round_weight(weight, "int4").dequantized()
    expected = (x @ (approximation - weight).T).square().mean() / (x @ weight.T).square().mean()
    assert hessian_error(weight, approximation, x.T @ x / 300) == pytest.approx(float(expected), rel=1e-4)


def test_gptq_on_independent_inputs_is_rounding_to_nearest() -> None:
    weight = _weight(16, 64)
    calibrated, nearest = gptq(weight, torch.eye(64, dtype=torch.float64)), round_weight(weight, "int4")
    assert torch.equal(calibrated.scale, nearest.scale)
    assert torch.equal(calibrated.levels, nearest.levels)


def test_inputs_that_never_occur_do_no_harm() -> None:
    weight, x = _weight(16, 64), _correlated(500, 64)
    x[:, ::3] = 0.0
    quantized = gptq(weight, x.T @ x / 500)
    assert float((quantized.dequantized() - weight)[:, ::3].abs().max()) < float(weight.abs().max()) / 4
    gptq(weight, torch.zeros(64, 64))


def test_hessian_that_is_not_finite_is_refused() -> None:
    with pytest.raises(CheckpointError, match="activations on the calibration text are not finite"):
        gptq(_weight(4, 8), torch.full((8, 8), float("nan")))


def test_calibration_covers_every_weight_and_leaves_the_tensors_alone() -> None:
    config = small_config(d_inner=(40, 24), d_state=(5, 7))
    tensors = random_tensors(config)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    seen: list[tuple[int, int]] = []
    quantized = Quantization("int4")
    ids = random_ids(config, 3, 20)
    found = calibrated_tensors(config, tensors, quantized, ids, progress=lambda done, total: seen.append((done, total)))
    nearest = round_tensors(tensors, quantized)
    assert set(found) == set(nearest)
    assert seen == [(1, 2), (2, 2)]
    assert all(torch.equal(tensors[name], before[name]) for name in before)
    for name, weight in nearest.items():
        if weight.format == "int8":
            assert torch.equal(found[name].levels, weight.levels), name
        else:
            assert not torch.equal(found[name].levels, weight.levels), name
