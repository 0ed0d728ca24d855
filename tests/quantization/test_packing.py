"""Packed weights: where each integer lies, and that nothing is lost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from yunmin.quantization.layout import WeightFormat, WeightLayout
from yunmin.quantization.packing import QuantizedWeight, pack, unpack

BLOCKS = [(16,), (1,), (40, 40), (3, 5, 5), (17, 16, 33)]
INPUTS = [1, 4, 31, 32, 33, 70]


def random_weight(layout: WeightLayout, seed: int = 0) -> QuantizedWeight:
    rng = torch.Generator().manual_seed(seed)
    low, high = (-127, 127) if layout.format == "int8" else (-8, 7)
    levels = torch.randint(low, high + 1, (layout.rows, layout.inputs), generator=rng).to(torch.int8)
    scale = torch.randn(layout.rows, layout.groups, generator=rng)
    return QuantizedWeight(layout.format, levels, scale.to(layout.scale_dtype))


def padded_rows(layout: WeightLayout) -> list[int | None]:
    """For each padded row, the row it holds."""
    rows: list[int | None] = []
    first = 0
    for block in layout.row_blocks:
        rows += [*range(first, first + block), *[None] * (-block % 16)]
        first += block
    return rows


def level(weight: QuantizedWeight, row: int | None, column: int) -> int:
    return 0 if row is None or column >= weight.levels.shape[1] else int(weight.levels[row, column])


def packed_by_loop(weight: QuantizedWeight, layout: WeightLayout) -> tuple[Tensor, Tensor]:  # noqa: C901
    """The format's definition, element by element."""
    rows = padded_rows(layout)
    blocks = len(rows) // 16
    if layout.format == "int8":
        columns = -(-layout.inputs // 4)
        packed = torch.zeros(blocks, columns, 16, 4, dtype=torch.uint8)
        scale = torch.zeros(len(rows))
        for b in range(blocks):
            for r in range(16):
                row = rows[16 * b + r]
                scale[16 * b + r] = 0.0 if row is None else weight.scale[row, 0]
                for g in range(columns):
                    for t in range(4):
                        packed[b, g, r, t] = level(weight, row, 4 * g + t) + 128
        return packed, scale
    groups = -(-layout.inputs // 32)
    packed = torch.zeros(blocks, groups, 4, 16, 4, dtype=torch.uint8)
    scale = torch.zeros(blocks, groups, 16, dtype=torch.float16)
    for b in range(blocks):
        for r in range(16):
            row = rows[16 * b + r]
            for g in range(groups):
                scale[b, g, r] = 0.0 if row is None else weight.scale[row, g]
                for i in range(4):
                    for t in range(4):
                        low = level(weight, row, 32 * g + 8 * i + t) + 8
                        high = level(weight, row, 32 * g + 8 * i + 4 + t) + 8
                        packed[b, g, i, r, t] = low + 16 * high
    return packed, scale


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("inputs", INPUTS)
def test_unpacking_gives_what_was_packed(weight_format: WeightFormat, blocks: tuple[int, ...], inputs: int) -> None:
    layout = WeightLayout(weight_format, blocks, inputs)
    weight = random_weight(layout)
    packed, scale = pack(weight, layout)
    assert (tuple(packed.shape), tuple(scale.shape)) == (layout.packed_shape, layout.scale_shape)
    assert (packed.dtype, scale.dtype) == (torch.uint8, layout.scale_dtype)
    assert packed.nbytes % 64 == 0
    found = unpack(packed, scale, layout)
    assert torch.equal(found.levels, weight.levels)
    assert torch.equal(found.scale, weight.scale)


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
@pytest.mark.parametrize(("blocks", "inputs"), [((3, 5, 5), 33), ((17, 17), 6), ((32,), 64)])
def test_packed_bytes_are_those_of_the_definition(
    weight_format: WeightFormat, blocks: tuple[int, ...], inputs: int
) -> None:
    layout = WeightLayout(weight_format, blocks, inputs)
    weight = random_weight(layout, seed=1)
    for found, expected in zip(pack(weight, layout), packed_by_loop(weight, layout), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
def test_dequantized_is_level_times_scale(weight_format: WeightFormat) -> None:
    layout = WeightLayout(weight_format, (5, 3), 70)
    weight = random_weight(layout, seed=2)
    group = 70 if weight_format == "int8" else 32
    expected = torch.tensor(
        [[float(weight.levels[r, c]) * float(weight.scale[r, c // group]) for c in range(70)] for r in range(8)]
    )
    assert torch.equal(weight.dequantized(), expected)


def test_bytes_per_weight_are_those_of_the_bits() -> None:
    for weight_format, per_weight, per_row in (("int8", 1.0, 4), ("int4", 0.5 + 2 / 32, 0)):
        layout = WeightLayout(weight_format, (1536, 1536), 768)  # type: ignore[arg-type]
        packed, scale = pack(random_weight(layout), layout)
        assert packed.nbytes + scale.nbytes == 3072 * 768 * per_weight + 3072 * per_row
