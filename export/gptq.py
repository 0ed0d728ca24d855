"""Rounding weights so that errors cancel on real inputs: GPTQ (Frantar et al. 2022), in groups of 32 inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from yunmin.errors import CheckpointError
from yunmin.quantization.layout import GROUP_SIZE
from yunmin.quantization.packing import QuantizedWeight
from yunmin.quantization.rounding import best_scales, to_levels

_DAMPENING = 0.01  # of the mean of the Hessian's diagonal, as in the paper


def gptq(weight: Tensor, hessian: Tensor) -> QuantizedWeight:
    """Rounds to int4 column by column; what a column loses, the columns after it make up for.

    The scale of each group is fixed when its first column is reached, from the weights as they are by then.

    Args:
        weight: W, float32 (rows, inputs).
        hessian: mean of x x^T over the layer's inputs x, (inputs, inputs).

    Returns:
        Levels and scales with a smaller error of W x, on such inputs, than rounding to nearest leaves.

    Raises:
        CheckpointError: the Hessian is not finite.
    """
    rows, inputs = weight.shape
    factor = _inverse_factor(hessian)  # (inputs, inputs), upper triangle
    left = weight.clone()
    levels = torch.empty(rows, inputs, dtype=torch.int8)
    scales = torch.empty(rows, -(-inputs // GROUP_SIZE), dtype=torch.float16)
    importance = hessian.diagonal().float() + _DAMPENING * float(hessian.diagonal().mean())
    for group, first in enumerate(range(0, inputs, GROUP_SIZE)):
        end = min(first + GROUP_SIZE, inputs)
        columns, inverse = left[:, first:end].clone(), factor[first:end, first:end]
        scale = best_scales(columns, importance[first:end])  # (rows, 1)
        errors = torch.empty_like(columns)
        for i in range(end - first):
            level = to_levels(columns[:, i : i + 1], scale)
            errors[:, i : i + 1] = (columns[:, i : i + 1] - level * scale) / inverse[i, i]
            columns[:, i:] -= errors[:, i : i + 1] * inverse[i, i:]
            levels[:, first + i] = level[:, 0].to(torch.int8)
        left[:, end:] -= errors @ factor[first:end, end:]
        scales[:, group] = scale[:, 0].half()
    return QuantizedWeight("int4", levels, scales)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of the dampened Hessian, float32."""
    if not bool(hessian.isfinite().all()):
        raise CheckpointError("the activations on the calibration text are not finite")
    dampened = hessian.double().clone()
    diagonal = dampened.diagonal()
    mean = diagonal.mean()
    diagonal += _DAMPENING * mean if mean > 0 else 1.0
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(dampened))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()
