"""Rounding weights to the nearest integers, and the error that this leaves."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from yunmin.errors import CheckpointError
from yunmin.quantization.layout import GROUP_SIZE, Quantization, WeightFormat
from yunmin.quantization.packing import QuantizedWeight

# The weight of largest magnitude becomes -8 or 7 times the scale, or a little more, which then is clipped.
_SHRINKING = tuple(1.0 - 0.03 * step for step in range(11))
_ROWS_AT_ONCE = 4096  # bounds the memory of the search
_TINY = 1e-30
_LARGEST = 7 * 65504.0  # 65504 is the largest scale in float16


def round_weight(weight: Tensor, weight_format: WeightFormat, importance: Tensor | None = None) -> QuantizedWeight:
    """Rounds to nearest.

    Args:
        weight: float32 (rows, inputs), finite.
        weight_format: int8 takes the largest magnitude of each row as 127; int4 searches the scale of each group of 32
            inputs among a few candidates for the least squared error.
        importance: of the inputs, their mean squares (inputs,), which then weigh the search; None for all the same.
    """
    if weight_format == "int8":
        return _round_int8(weight)
    parts = [_round_int4(rows, importance) for rows in weight.split(_ROWS_AT_ONCE)]
    return QuantizedWeight("int4", torch.cat([levels for levels, _ in parts]), torch.cat([scale for _, scale in parts]))


def round_tensors(tensors: Mapping[str, Tensor], quantized: Quantization) -> dict[str, QuantizedWeight]:
    """Rounds every weight that is to be quantized.

    Raises:
        CheckpointError: a weight is not finite or too large; names it.
    """
    weights = {}
    for name, tensor in tensors.items():
        weight_format = quantized.of(name)
        if weight_format is not None:
            require_quantizable(name, tensor)
            weights[name] = round_weight(tensor.float(), weight_format)
    return weights


def require_quantizable(name: str, weight: Tensor) -> None:
    """Refuses what integers cannot stand for.

    Raises:
        CheckpointError: the weight has NaN, infinity, or a magnitude whose scale float16 does not hold.
    """
    largest = float(weight.abs().max())
    if not largest <= _LARGEST:  # NaN neither
        raise CheckpointError(f"{name}: to be quantized, magnitudes must be at most {_LARGEST:.0f}, found {largest:g}")


def best_scales(groups: Tensor, importance: Tensor | None = None) -> Tensor:
    """The scale of each group that leaves the least squared error among a few candidates.

    The extreme weight lands on -8 or on 7, so scales are negative where that is better.

    Args:
        groups: float32 (..., n), n weights sharing a scale.
        importance: of each weight, broadcast to `groups`; None for all the same.

    Returns:
        Scales that float16 holds exactly, float32 (..., 1).
    """
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))  # (..., 1)
    best = torch.zeros_like(extreme)
    least = torch.full_like(extreme, torch.inf)
    for level in (-8.0, 7.0):
        for factor in _SHRINKING:
            scale = (extreme * (factor / level)).half().float()
            error = (to_levels(groups, scale) * scale - groups).square_()
            total = (error if importance is None else error.mul_(importance)).sum(-1, keepdim=True)
            is_better = total < least
            best, least = torch.where(is_better, scale, best), torch.where(is_better, total, least)
    return best


def to_levels(weight: Tensor, scale: Tensor) -> Tensor:
    """The int4 levels nearest to `weight / scale`, in -8..7, as float32; 0 where the scale is 0."""
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
    return (weight * inverse).round_().clamp_(-8.0, 7.0)


def relative_error(weight: Tensor, approximation: Tensor, importance: Tensor | None = None) -> float:
    """Sum of squared errors over the sum of squares, columns weighted by `importance` (inputs,)."""
    weight = weight.double()
    importance = torch.ones(weight.shape[1]) if importance is None else importance
    error = ((approximation.double() - weight).square() @ importance.double()).sum()
    return float(error / (weight.square() @ importance.double()).sum().clamp_min(_TINY))


def _round_int8(weight: Tensor) -> QuantizedWeight:
    scale = weight.abs().amax(1, keepdim=True) / 127
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
    return QuantizedWeight("int8", (weight * inverse).round().clamp(-127, 127).to(torch.int8), scale)


def _round_int4(weight: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    rows, inputs = weight.shape
    missing = -inputs % GROUP_SIZE
    groups = F.pad(weight, (0, missing)).view(rows, -1, GROUP_SIZE)
    weights = None if importance is None else F.pad(importance, (0, missing)).view(-1, GROUP_SIZE)
    scale = best_scales(groups, weights)  # (rows, groups, 1)
    levels = to_levels(groups, scale).view(rows, -1)[:, :inputs].to(torch.int8)
    return levels, scale.squeeze(-1).half()
