"""Integers and scales of a weight, and their packed form in a file; `yunmin.quantization.layout` defines it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from yunmin.config import MambaConfig
from yunmin.quantization.layout import (
    BLOCK_ROWS,
    GROUP_SIZE,
    Quantization,
    WeightFormat,
    WeightLayout,
    layout_of,
    packed_name,
    scale_name,
)

_LIMITS = {"int8": (-127, 127), "int4": (-8, 7)}
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as integers times scales, without padding.

    Attributes:
        format: of the integers.
        levels: the integers q, int8 (rows, inputs).
        scale: float32 (rows, 1) for int8, float16 (rows, ceil(inputs / 32)) for int4.
    """

    format: WeightFormat
    levels: Tensor
    scale: Tensor

    def dequantized(self) -> Tensor:
        """The weight q * scale, float32 (rows, inputs)."""
        scale = self.scale.float()
        if self.format == "int4":
            scale = scale.repeat_interleave(GROUP_SIZE, dim=1)[:, : self.levels.shape[1]]
        weight = torch.empty(self.levels.shape, dtype=torch.float32, device=self.levels.device)
        # some rows at a time: integers and floats are multiplied by way of a copy
        for part, levels, scales in zip(*(t.split(_ROWS_AT_ONCE) for t in (weight, self.levels, scale)), strict=True):
            torch.mul(levels, scales, out=part)
        return weight


def pack(weight: QuantizedWeight, layout: WeightLayout) -> tuple[Tensor, Tensor]:
    """The two tensors of a file.

    Args:
        weight: (rows, inputs) as `layout` has them.
        layout: where everything goes.

    Returns:
        Packed integers, uint8, and scales, of the layout's shapes and dtypes.
    """
    low, high = _LIMITS[weight.format]
    assert weight.format == layout.format
    assert tuple(weight.levels.shape) == (layout.rows, layout.inputs)
    assert weight.levels.numel() == 0 or low <= int(weight.levels.min()) <= int(weight.levels.max()) <= high
    positions = layout.row_positions()
    zero = 128 if layout.format == "int8" else 8
    shifted = torch.full((layout.padded_rows, layout.padded_inputs), zero, dtype=torch.uint8)
    shifted[positions, : layout.inputs] = (weight.levels.to(torch.int16) + zero).to(torch.uint8)
    scale = torch.zeros(layout.padded_rows, layout.groups, dtype=layout.scale_dtype)
    scale[positions] = weight.scale.to(layout.scale_dtype)
    if layout.format == "int8":
        packed = shifted.view(-1, BLOCK_ROWS, layout.padded_inputs // 4, 4).transpose(1, 2)
        return packed.contiguous(), scale[:, 0].contiguous()
    nibbles = shifted.view(-1, BLOCK_ROWS, layout.groups, 4, 2, 4)  # (block, row, group, i, half, t)
    packed = nibbles[..., 0, :] | (nibbles[..., 1, :] << 4)  # (block, row, group, i, t)
    return packed.permute(0, 2, 3, 1, 4).contiguous(), scale.view(-1, BLOCK_ROWS, layout.groups).mT.contiguous()


def unpack(packed: Tensor, scale: Tensor, layout: WeightLayout) -> QuantizedWeight:
    """What `pack` was given."""
    positions = layout.row_positions()
    if layout.format == "int8":
        shifted = packed.transpose(1, 2).reshape(layout.padded_rows, layout.padded_inputs)
        levels = (shifted[positions, : layout.inputs].to(torch.int16) - 128).to(torch.int8)
        return QuantizedWeight("int8", levels, scale[positions, None])
    rows = packed.permute(0, 3, 1, 2, 4)  # (block, row, group, i, t)
    nibbles = torch.stack([rows & 15, rows >> 4], dim=-2)  # (block, row, group, i, half, t)
    shifted = nibbles.reshape(layout.padded_rows, layout.padded_inputs)
    levels = shifted[positions, : layout.inputs].to(torch.int8) - 8
    return QuantizedWeight("int4", levels, scale.mT.reshape(layout.padded_rows, layout.groups)[positions])


def pack_tensors(
    config: MambaConfig, tensors: Mapping[str, Tensor], weights: Mapping[str, QuantizedWeight], quantized: Quantization
) -> dict[str, Tensor]:
    """The tensors of a quantized checkpoint.

    Args:
        config: describes `tensors`.
        tensors: float32, by name; those that are quantized need not be there.
        weights: one for each weight that is quantized.
        quantized: which these are.
    """
    stored = {name: tensor for name, tensor in tensors.items() if quantized.of(name) is None}
    for name, weight in weights.items():
        packed, scale = pack(weight, layout_of(config, quantized, name))
        stored[packed_name(name, weight.format)] = packed
        stored[scale_name(name)] = scale
    return stored


def unpack_tensor(
    config: MambaConfig, tensors: Mapping[str, Tensor], name: str, quantized: Quantization
) -> QuantizedWeight:
    """One quantized weight of a checked quantized checkpoint."""
    layout = layout_of(config, quantized, name)
    return unpack(tensors[packed_name(name, layout.format)], tensors[scale_name(name)], layout)
