"""The whole network as one kernel: every thread of a team runs it and does its share of each part.

Rows (positions) are divided for norms and for rounding, outputs for products, channels for convolution and scan. Where
a part reads what others wrote, the team meets; a thread convolves and scans the very channels that it projected.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from yunmin.kernels.barrier import meet
from yunmin.kernels.jit import inline, jit
from yunmin.kernels.matmul import (
    BLOCKS,
    FLOAT32,
    KIND,
    TILE_ROWS,
    VALUES,
    WEIGHT_FIELDS,
    WIDTH,
    project,
    quantize_row,
)
from yunmin.kernels.memory import floats_at
from yunmin.kernels.vector import LANES, load, store
from yunmin.runtime.native.layers import convolve, embed, normalize, scan, share
from yunmin.runtime.native.records import (
    CONVOLVED,
    DELTA,
    DELTA_STRIDE,
    DT_PROJ,
    EMBEDDING,
    FINAL_NORM,
    GATED,
    HEAD,
    HIDDEN,
    IN_PROJ,
    INNER,
    MAPS,
    MAPS_STRIDE,
    MEETING,
    MODEL_WIDTH,
    NORM,
    OUT_PROJ,
    PRIVATE,
    PRIVATE_STRIDE,
    RANK,
    RESIDUAL,
    STATE_NUMBERS,
    TAPS,
    X_PROJ,
    XZ,
    XZ_STRIDE,
)


@inline
def _weight(record: Any, position: int) -> Any:
    return record[position : position + WEIGHT_FIELDS]


@inline
def _normalized_row(model: Any, scratch: Any, norm: int, source: int, row: int, eps: float, quantizes: bool) -> None:
    """The residual stream's row `source`, normalized into row `row` of the hidden activations."""
    width = model[MODEL_WIDTH]
    used = (width + LANES - 1) // LANES * LANES
    hidden = scratch[HIDDEN:CONVOLVED]
    residual = scratch[RESIDUAL] + 4 * source * used
    normalize(residual, norm, width, used, eps, hidden[VALUES] + 4 * row * hidden[WIDTH])
    if quantizes:
        quantize_row(hidden, row, used)


@jit
def _run_layer(
    model: Any,
    layer: Any,
    scratch: Any,
    step_sizes: Any,
    states: int,
    batch: int,
    length: int,
    eps: float,
    rank: int,
    size: int,
) -> None:
    """One residual block over `batch` sequences of `length` positions; leaves the team together."""
    rows, inner = batch * length, layer[INNER]
    zero, one = np.int64(0), np.int64(1)  # no literals, see `project`
    width = (model[MODEL_WIDTH] + LANES - 1) // LANES * LANES
    begin, end = share(rows, rank, size)
    first, last = share(inner // LANES, rank, size)
    private = scratch[PRIVATE] + rank * scratch[PRIVATE_STRIDE]
    hidden, convolved, gated = scratch[HIDDEN:CONVOLVED], scratch[CONVOLVED:GATED], scratch[GATED:RESIDUAL]
    in_proj, x_proj = _weight(layer, IN_PROJ), _weight(layer, X_PROJ)
    dt_proj, out_proj = _weight(layer, DT_PROJ), _weight(layer, OUT_PROJ)

    for row in range(begin, end):
        _normalized_row(model, scratch, layer[NORM], row, row, eps, in_proj[KIND] != FLOAT32)
    meet(scratch[MEETING], size)

    xz, xz_stride, half = scratch[XZ], scratch[XZ_STRIDE], inner // LANES
    project(in_proj, hidden, zero, rows, first, last, xz, xz_stride, zero, private)
    project(in_proj, hidden, zero, rows, half + first, half + last, xz, xz_stride, zero, private)
    convolve(layer, scratch, states, model[STATE_NUMBERS], model[TAPS], batch, length, first * LANES, last * LANES)
    meet(scratch[MEETING], size)

    if x_proj[KIND] != FLOAT32:
        for row in range(begin, end):
            quantize_row(convolved, row, inner)
        meet(scratch[MEETING], size)

    maps, maps_stride = scratch[MAPS], scratch[MAPS_STRIDE]
    if rows >= TILE_ROWS * size:  # few outputs: whole tiles come from dividing the rows
        project(x_proj, convolved, begin, end, zero, x_proj[BLOCKS], maps, maps_stride, zero, private)
    else:
        x_first, x_last = share(x_proj[BLOCKS], rank, size)
        project(x_proj, convolved, zero, rows, x_first, x_last, maps, maps_stride, zero, private)
    meet(scratch[MEETING], size)

    _copy_step_sizes(step_sizes, maps, maps_stride, rows, layer[RANK], dt_proj[KIND] != FLOAT32)
    project(dt_proj, step_sizes, zero, rows, first, last, scratch[DELTA], scratch[DELTA_STRIDE], zero, private)
    scan(layer, scratch, states, model[STATE_NUMBERS], batch, length, first * LANES, last * LANES, rank)
    meet(scratch[MEETING], size)

    if out_proj[KIND] != FLOAT32:
        for row in range(begin, end):
            quantize_row(gated, row, inner)
        meet(scratch[MEETING], size)

    out_first, out_last = share(out_proj[BLOCKS], rank, size)
    project(out_proj, gated, zero, rows, out_first, out_last, scratch[RESIDUAL], width, one, private)
    meet(scratch[MEETING], size)


@inline
def _copy_step_sizes(step_sizes: Any, maps: int, stride: int, rows: int, used: int, quantizes: bool) -> None:
    """The low-rank step sizes of all rows into a thread's own activations: cheaper than to meet once more."""
    for row in range(rows):
        source = floats_at(maps + 4 * row * stride, used)
        written = floats_at(step_sizes[VALUES] + 4 * row * step_sizes[WIDTH], used)
        for i in range(0, used, LANES):
            store(written, i, load(source, i))
        if quantizes:
            quantize_row(step_sizes, row, used)


@jit
def run_network(
    model: Any,
    layers: Any,
    scratch: Any,
    step_sizes: Any,
    token_ids: Any,
    batch: int,
    length: int,
    states: int,
    eps: float,
    logits: int,
    all_positions: bool,
    rank: int,
    size: int,
) -> None:
    """Reads `length` tokens of each of `batch` sequences.

    Args:
        model, layers, scratch: records, int64; see `yunmin.runtime.native.records`.
        step_sizes: int64 (size, ACTIVATION_FIELDS), each thread's own activations of width R.
        token_ids: int64 (batch * length,), sequence by sequence.
        batch, length: at least 1; together no more rows than the scratch memory has.
        states: address of float32 (batch, STATE_NUMBERS), updated.
        eps: of the norms.
        logits: address of float32 (rows, 16 * blocks of the head): of each sequence's last position, or of all.
        all_positions: which.
        rank, size: of the team.
    """
    width = (model[MODEL_WIDTH] + LANES - 1) // LANES * LANES
    begin, end = share(batch * length, rank, size)
    for row in range(begin, end):
        embed(_weight(model, EMBEDDING), token_ids[row], model[MODEL_WIDTH], scratch[RESIDUAL] + 4 * row * width)
    for index in range(layers.shape[0]):
        _run_layer(model, layers[index], scratch, step_sizes[rank], states, batch, length, eps, rank, size)
    head = _weight(model, HEAD)
    wanted = batch * length if all_positions else batch
    begin, end = share(wanted, rank, size)
    for row in range(begin, end):
        source = row if all_positions else row * length + length - 1
        _normalized_row(model, scratch, model[FINAL_NORM], source, row, eps, head[KIND] != FLOAT32)
    meet(scratch[MEETING], size)
    first, last = share(head[BLOCKS], rank, size)
    private = scratch[PRIVATE] + rank * scratch[PRIVATE_STRIDE]
    zero = np.int64(0)
    project(head, scratch[HIDDEN:CONVOLVED], zero, wanted, first, last, logits, head[BLOCKS] * LANES, zero, private)
