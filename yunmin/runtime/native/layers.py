"""The parts of a layer between its products: norm, convolution, scan; each for some rows or some channels.

The kernels for training (`yunmin.kernels`) compute the same over tensors; these work in the runtime's own memory, where
the states are updated in place and a sequence of one position is the usual case.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from yunmin.kernels.jit import inline
from yunmin.kernels.matmul import INT8, KIND, SCALES, TILE_NUMBERS, VALUES, WEIGHTS, WIDTH
from yunmin.kernels.memory import bytes_at, floats_at
from yunmin.kernels.vector import LANES, exp2, load, silu, softplus, splat, store, total
from yunmin.runtime.native.records import (
    CONV_BIAS,
    CONV_STATE,
    CONV_TAPS,
    CONVOLVED,
    DECAY,
    DELTA,
    DELTA_STRIDE,
    GATED,
    INNER,
    MAPS,
    MAPS_STRIDE,
    PRIVATE,
    PRIVATE_STRIDE,
    RANK,
    SKIP,
    SSM_STATE,
    STATES,
    XZ,
    XZ_STRIDE,
)


@inline
def embed(weight: Any, token_id: int, width: int, out: int) -> None:
    """Writes the embedding of a token, `width` numbers and zeros up to whole vectors, to the address `out`."""
    used = (width + LANES - 1) // LANES * LANES
    written = floats_at(out, used)
    for i in range(width, used):  # NaN of an earlier sequence may lie there
        written[i] = np.float32(0.0)
    if weight[KIND] == INT8:
        block, row = token_id // LANES, token_id % LANES
        steps = (width + 3) // 4
        packed = bytes_at(weight[WEIGHTS] + block * steps * 4 * LANES, steps * 4 * LANES)
        scale = floats_at(weight[SCALES] + 4 * token_id, 1)[0]
        for i in range(width):
            byte = packed[(i // 4 * LANES + row) * 4 + i % 4]  # read as signed: 128 more or less than the number
            written[i] = np.float32(np.int32(byte ^ np.int8(-128))) * scale
    else:
        table = floats_at(weight[WEIGHTS] + 4 * token_id * width, width)
        for i in range(width):
            written[i] = table[i]


@inline
def normalize(residual: int, norm: int, width: int, used: int, eps: float, out: int) -> None:
    """RMSNorm of the row at address `residual`; `used` is the width padded to vectors."""
    x, weight, written = floats_at(residual, used), floats_at(norm, used), floats_at(out, used)
    squares = splat(x, 0.0)
    for i in range(0, used, LANES):
        squares = squares + load(x, i) * load(x, i)
    factor = np.float32(1.0) / np.sqrt(total(squares) / np.float32(width) + np.float32(eps))
    for i in range(0, used, LANES):
        store(written, i, load(x, i) * factor * load(weight, i))


@inline
def convolve(
    layer: Any, scratch: Any, states: int, state_numbers: int, taps: int, batch: int, length: int, begin: int, end: int
) -> None:
    """Causal convolution and SiLU of the channels `begin` to `end`, multiples of 16; updates the carried inputs."""
    inner, stride, out_stride = layer[INNER], scratch[XZ_STRIDE], scratch[CONVOLVED + WIDTH]
    weight, bias = floats_at(layer[CONV_TAPS], taps * inner), floats_at(layer[CONV_BIAS], inner)
    kept = taps - 1
    for b in range(batch):
        x = floats_at(scratch[XZ] + 4 * b * length * stride, length * stride)
        y = floats_at(scratch[CONVOLVED + VALUES] + 4 * b * length * out_stride, length * out_stride)
        state = floats_at(states + 4 * (b * state_numbers + layer[CONV_STATE]), kept * inner)
        for c in range(begin, end, LANES):
            for t in range(length):
                value = load(bias, c)
                for k in range(taps):
                    source = t + k - kept
                    if source >= 0:
                        value = value + load(weight, k * inner + c) * load(x, source * stride + c)
                    else:
                        value = value + load(weight, k * inner + c) * load(state, (source + kept) * inner + c)
                store(y, t * out_stride + c, silu(value))
            for k in range(kept):  # in rising order, so that nothing is overwritten before it is moved
                source = length + k - kept
                if source >= 0:
                    store(state, k * inner + c, load(x, source * stride + c))
                else:
                    store(state, k * inner + c, load(state, (source + kept) * inner + c))


@inline
def scan(
    layer: Any, scratch: Any, states: int, state_numbers: int, batch: int, length: int, begin: int, end: int, rank: int
) -> None:
    """Softplus, scan, skip and gate of the channels `begin` to `end`, multiples of 16; updates the states."""
    inner, n = layer[INNER], layer[STATES]
    z_stride, maps_stride, delta_stride = scratch[XZ_STRIDE], scratch[MAPS_STRIDE], scratch[DELTA_STRIDE]
    u_stride, y_stride = scratch[CONVOLVED + WIDTH], scratch[GATED + WIDTH]
    decay, skip = floats_at(layer[DECAY], inner * n), floats_at(layer[SKIP], inner)
    maps_begin = layer[RANK]
    outputs_begin = maps_begin + (n + LANES - 1) // LANES * LANES
    local = floats_at(scratch[PRIVATE] + rank * scratch[PRIVATE_STRIDE] + 4 * TILE_NUMBERS, n * LANES)
    for b in range(batch):
        z = floats_at(scratch[XZ] + 4 * (b * length * z_stride + inner), length * z_stride - inner)
        maps = floats_at(scratch[MAPS] + 4 * b * length * maps_stride, length * maps_stride)
        raw = floats_at(scratch[DELTA] + 4 * b * length * delta_stride, length * delta_stride)
        u = floats_at(scratch[CONVOLVED + VALUES] + 4 * b * length * u_stride, length * u_stride)
        y = floats_at(scratch[GATED + VALUES] + 4 * b * length * y_stride, length * y_stride)
        state = floats_at(states + 4 * (b * state_numbers + layer[SSM_STATE]), n * inner)
        for c in range(begin, end, LANES):
            rates = c * n
            for i in range(n):
                store(local, i * LANES, load(state, i * inner + c))
            for t in range(length):
                delta = softplus(load(raw, t * delta_stride + c))
                inputs = load(u, t * u_stride + c)
                step = delta * inputs
                even = load(skip, c) * inputs
                odd = splat(even, 0.0)
                at = t * maps_stride + maps_begin
                into, out = at, at + outputs_begin - maps_begin
                for i in range(n // 2):  # two sums, so that neither waits for itself
                    j = 2 * i * LANES
                    h = exp2(delta * load(decay, rates + j)) * load(local, j) + step * maps[into + 2 * i]
                    store(local, j, h)
                    even = even + h * maps[out + 2 * i]
                    j += LANES
                    h = exp2(delta * load(decay, rates + j)) * load(local, j) + step * maps[into + 2 * i + 1]
                    store(local, j, h)
                    odd = odd + h * maps[out + 2 * i + 1]
                if n % 2:
                    j = (n - 1) * LANES
                    h = exp2(delta * load(decay, rates + j)) * load(local, j) + step * maps[into + n - 1]
                    store(local, j, h)
                    even = even + h * maps[out + n - 1]
                store(y, t * y_stride + c, (even + odd) * silu(load(z, t * z_stride + c)))
            for i in range(n):
                store(state, i * inner + c, load(local, i * LANES))


@inline
def share(count: int, rank: int, size: int) -> tuple[int, int]:
    """The part of 0..count that a thread does."""
    return count * rank // size, count * (rank + 1) // size
