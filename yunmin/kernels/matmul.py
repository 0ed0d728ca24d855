"""Products of activations with packed weights: float32, int8 and int4 (formats: `yunmin.quantization`).

Activations are quantized with one scale per row. Everything about a row depends on that row alone, and all sums have a
fixed order, so any division of rows and outputs among tiles, batches and threads gives the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from yunmin.kernels.jit import inline, jit
from yunmin.kernels.memory import bytes_at, floats_at, ints_at
from yunmin.kernels.tile import GROUP, multiply_float32, multiply_int4, multiply_int8
from yunmin.kernels.vector import (
    LANES,
    ROUNDER,
    larger,
    largest,
    load,
    magnitude,
    splat,
    store,
    store_low_bytes,
    to_float,
    total,
)

# kinds of weights
FLOAT32, INT8, INT4 = 0, 1, 2

# fields of a weight's description, int64
KIND, WEIGHTS, SCALES, BIAS, BLOCKS, INPUTS = range(6)
WEIGHT_FIELDS = 6

# fields of the description of activations, int64: addresses of
#   values   float32 (rows, width)       bytes    int8 (rows, width)
#   scale    float32 (rows,)             start8   int32 (rows,), -128 times the sum of a row's bytes
#   start4   int32 (rows, width / 32), -8 times the sum of a group's bytes
VALUES, BYTES, SCALE, START8, START4, WIDTH = range(6)
ACTIVATION_FIELDS = 6

TILE_ROWS, TILE_BLOCKS = 6, 4
TILE_NUMBERS = TILE_ROWS * TILE_BLOCKS * LANES


@jit
def quantize_row(activations: Any, row: int, used: int) -> None:
    """Rounds a row of values to int8 by its largest magnitude; what is not finite makes the row's scale NaN.

    Args:
        activations: described by `VALUES` and so on; `WIDTH` is a multiple of 32.
        row: which.
        used: numbers in the row, a multiple of 16; the rest becomes 0.
    """
    width = activations[WIDTH]
    values = floats_at(activations[VALUES] + 4 * row * width, width)
    rounded = bytes_at(activations[BYTES] + row * width, width)
    groups = width // GROUP
    start4 = ints_at(activations[START4] + 4 * row * groups, groups)
    for i in range(used, width, LANES):
        store(values, i, splat(values, 0.0))
    peak = splat(values, 0.0)
    poison = splat(values, 0.0)
    for i in range(0, used, LANES):
        value = load(values, i)
        peak = larger(magnitude(value), peak)
        poison = poison + value * 0.0
    highest = largest(peak)
    inverse = np.float32(127.0) / highest
    if not inverse < np.inf:  # a row of zeros, or so close to zero that its inverse overflows
        inverse = np.float32(0.0)
    floats_at(activations[SCALE] + 4 * row, 1)[0] = highest / np.float32(127.0) + total(poison)
    whole = np.int32(0)
    for group in range(groups):
        first = load(values, group * GROUP) * inverse + ROUNDER
        second = load(values, group * GROUP + LANES) * inverse + ROUNDER
        store_low_bytes(rounded, group * GROUP, first)
        store_low_bytes(rounded, group * GROUP + LANES, second)
        in_group = np.int32(total((first - ROUNDER) + (second - ROUNDER)))
        start4[group] = np.int32(-8) * in_group
        whole += in_group
    ints_at(activations[START8] + 4 * row, 1)[0] = np.int32(-128) * whole


@jit
def project(
    weight: Any,
    activations: Any,
    row_begin: int,
    row_end: int,
    block_begin: int,
    block_end: int,
    out: int,
    out_stride: int,
    adds: int,
    sums_address: int,
) -> None:
    """Multiplies some rows of activations with some blocks of a weight.

    Args:
        weight: described by `KIND` and so on.
        activations: described by `VALUES` and so on; quantized where the weight is.
        row_begin, row_end: rows.
        block_begin, block_end: blocks of 16 outputs.
        out: address of float32 (rows, out_stride); block 0 goes to its first columns.
        out_stride: numbers between its rows.
        adds: 1 where results are added to what is there, else 0.
        sums_address: of TILE_NUMBERS 32-bit numbers to work in.

    Callers pass no literals: numba would compile all of this once more for each.
    """
    kind = weight[KIND]
    width = activations[WIDTH]
    inputs = weight[INPUTS]
    block = block_begin
    while block < block_end:
        wide = block_end - block >= TILE_BLOCKS
        blocks = TILE_BLOCKS if wide else 1
        row = row_begin
        while row < row_end:
            if kind == INT8:
                rows = _tile_int8(weight, activations, width, inputs, row, row_end - row, block, wide, sums_address)
            elif kind == INT4:
                rows = _tile_int4(weight, activations, width, inputs, row, row_end - row, block, wide, sums_address)
            else:
                rows = _tile_float32(weight, activations, width, inputs, row, row_end - row, block, wide, sums_address)
            _finish(weight, activations, row, rows, block, blocks, out, out_stride, adds, sums_address)
            row += rows
        block += blocks


@inline
def _finish(
    weight: Any,
    activations: Any,
    row: int,
    rows: int,
    block: int,
    blocks: int,
    out: int,
    out_stride: int,
    adds: int,
    sums_address: int,
) -> None:
    """Scales a tile's sums, adds the bias, and stores them."""
    kind = weight[KIND]
    exact = ints_at(sums_address, TILE_NUMBERS)
    sums = floats_at(sums_address, TILE_NUMBERS)
    scales = floats_at(weight[SCALES], weight[BLOCKS] * LANES)
    bias = floats_at(weight[BIAS], weight[BLOCKS] * LANES)
    row_scale = floats_at(activations[SCALE] + 4 * row, rows)
    for r in range(rows):
        written = floats_at(out + 4 * (row + r) * out_stride, out_stride)
        for b in range(blocks):
            tile, column = (r * blocks + b) * LANES, (block + b) * LANES
            if kind == INT8:
                value = to_float(load(exact, tile)) * row_scale[r] * load(scales, column)
            else:
                value = load(sums, tile)
                if kind == INT4:
                    value = value * row_scale[r]
            if weight[BIAS] != 0:
                value = value + load(bias, column)
            if adds:
                value = load(written, column) + value
            store(written, column, value)


@inline
def _tile_int8(
    weight: Any, activations: Any, width: int, inputs: int, row: int, left: int, block: int, wide: bool, sums: int
) -> int:
    """One tile of an int8 product; returns its rows."""
    x, start = activations[BYTES] + row * width, activations[START8] + 4 * row
    stride = inputs * LANES
    w, steps = weight[WEIGHTS] + block * stride, inputs // 4
    if wide:
        if left >= 6:
            multiply_int8(6, 4, x, width, start, w, stride, steps, sums)
            return 6
        if left >= 4:
            multiply_int8(4, 4, x, width, start, w, stride, steps, sums)
            return 4
        if left >= 2:
            multiply_int8(2, 4, x, width, start, w, stride, steps, sums)
            return 2
        multiply_int8(1, 4, x, width, start, w, stride, steps, sums)
        return 1
    if left >= 6:
        multiply_int8(6, 1, x, width, start, w, stride, steps, sums)
        return 6
    multiply_int8(1, 1, x, width, start, w, stride, steps, sums)
    return 1


@inline
def _tile_int4(
    weight: Any, activations: Any, width: int, inputs: int, row: int, left: int, block: int, wide: bool, sums: int
) -> int:
    """One tile of an int4 product; returns its rows."""
    groups = inputs // GROUP
    x, start, start_stride = activations[BYTES] + row * width, activations[START4], 4 * (width // GROUP)
    start += row * start_stride
    stride, scale_stride = inputs // 2 * LANES, 2 * groups * LANES
    w, s = weight[WEIGHTS] + block * stride, weight[SCALES] + block * scale_stride
    if wide:
        if left >= 3:
            multiply_int4(3, 4, x, width, start, start_stride, w, stride, s, scale_stride, groups, sums)
            return 3
        if left >= 2:
            multiply_int4(2, 4, x, width, start, start_stride, w, stride, s, scale_stride, groups, sums)
            return 2
        multiply_int4(1, 4, x, width, start, start_stride, w, stride, s, scale_stride, groups, sums)
        return 1
    if left >= 6:
        multiply_int4(6, 1, x, width, start, start_stride, w, stride, s, scale_stride, groups, sums)
        return 6
    multiply_int4(1, 1, x, width, start, start_stride, w, stride, s, scale_stride, groups, sums)
    return 1


@inline
def _tile_float32(
    weight: Any, activations: Any, width: int, inputs: int, row: int, left: int, block: int, wide: bool, sums: int
) -> int:
    """One tile of a float32 product; returns its rows."""
    x = activations[VALUES] + 4 * row * width
    stride = 4 * inputs * LANES
    w = weight[WEIGHTS] + block * stride
    if wide:
        if left >= 6:
            multiply_float32(6, 4, x, 4 * width, w, stride, inputs, sums)
            return 6
        if left >= 4:
            multiply_float32(4, 4, x, 4 * width, w, stride, inputs, sums)
            return 4
        if left >= 2:
            multiply_float32(2, 4, x, 4 * width, w, stride, inputs, sums)
            return 2
        multiply_float32(1, 4, x, 4 * width, w, stride, inputs, sums)
        return 1
    if left >= 6:
        multiply_float32(6, 1, x, 4 * width, w, stride, inputs, sums)
        return 6
    multiply_float32(1, 1, x, 4 * width, w, stride, inputs, sums)
    return 1
