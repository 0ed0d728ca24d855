"""Depthwise causal convolution and SiLU on the CPU, forward and backward, with carried inputs.

Divided like the scan: chunks of positions, in them blocks of LANES channels, whose inputs and the K-1 before them are
first gathered into a window. Taps are (K, blocks, LANES), bias is (blocks, LANES).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from yunmin.kernels.cpu_scan import share_begin
from yunmin.kernels.jit import inline, jit
from yunmin.kernels.rows import fetch, read, write
from yunmin.kernels.vector import LANES, load, sigmoid, silu, splat, store

_CHUNK = 64  # positions


@jit
def convolution_forward(x: Any, before: Any, taps: Any, bias: Any, y: Any, shape: Any, rank: int, size: int) -> None:
    """Writes y.

    Args:
        x: inputs, rows (B, L, D).
        before: the inputs before them, rows (B, K-1, D).
        taps: (K, blocks, LANES), the last one for the current position.
        bias: (blocks, LANES).
        y: outputs, rows (B, L, D).
        shape: B, L, D, K.
        rank: of this thread.
        size: of the team.
    """
    batch, length, inner, n_taps = shape
    blocks = (inner + LANES - 1) // LANES
    window = np.empty((_CHUNK + n_taps - 1) * LANES, taps.dtype)
    first, stop = share_begin(batch * blocks, rank, size), share_begin(batch * blocks, rank + 1, size)
    for b in range(first // blocks, (stop + blocks - 1) // blocks):
        for begin in range(0, length, _CHUNK):
            end = min(begin + _CHUNK, length)
            for block in range(max(first - b * blocks, 0), min(stop - b * blocks, blocks)):
                channel, count = block * LANES, inner - block * LANES
                _fill_window(window, x, before, b, begin, end, channel, count, n_taps)
                for t in range(end - begin):
                    value = _convolve(window, t, taps, bias, channel, blocks * LANES, n_taps)
                    write(y, b, begin + t, channel, silu(value), count)


@jit
def convolution_backward(
    x: Any,
    before: Any,
    taps: Any,
    bias: Any,
    grad_y: Any,
    grad_x: Any,
    grad_before: Any,
    grad_taps: Any,
    grad_bias: Any,
    later: Any,
    shape: Any,
    rank: int,
    size: int,
) -> None:
    """Writes the gradients of all inputs.

    Args:
        x: as in the forward.
        before: as in the forward.
        taps: as in the forward.
        bias: as in the forward.
        grad_y: rows (B, L, D).
        grad_x: rows (B, L, D).
        grad_before: rows (B, K-1, D).
        grad_taps: zeros (B, K, blocks, LANES), becomes the sum over positions.
        grad_bias: zeros (B, blocks, LANES), likewise.
        later: zeros (B, blocks, K-1, LANES), room for what a chunk leaves to the one before it.
        shape: B, L, D, K.
        rank: of this thread.
        size: of the team.
    """
    batch, length, inner, n_taps = shape
    blocks = (inner + LANES - 1) // LANES
    width = blocks * LANES
    history = (n_taps - 1) * LANES
    window = np.empty(_CHUNK * LANES + history, taps.dtype)
    inside = np.empty(_CHUNK * LANES + history, taps.dtype)  # gradients before SiLU, with those of the next K-1
    first, stop = share_begin(batch * blocks, rank, size), share_begin(batch * blocks, rank + 1, size)
    for b in range(first // blocks, (stop + blocks - 1) // blocks):
        for begin in range((length - 1) // _CHUNK * _CHUNK, -1, -_CHUNK):
            end = min(begin + _CHUNK, length)
            positions = end - begin
            for block in range(max(first - b * blocks, 0), min(stop - b * blocks, blocks)):
                channel, count = block * LANES, inner - block * LANES
                later_at = (b * blocks + block) * history
                _fill_window(window, x, before, b, begin, end, channel, count, n_taps)
                for i in range(0, history, LANES):
                    store(inside, positions * LANES + i, load(later, later_at + i))
                grad_offset = load(grad_bias, b * width + channel)
                for t in range(positions):
                    value = _convolve(window, t, taps, bias, channel, width, n_taps)
                    share = sigmoid(value)
                    gradient = read(grad_y, b, begin + t, channel, count) * (share * (1.0 + value * (1.0 - share)))
                    fetch(grad_y, b, begin + t, channel + LANES)
                    store(inside, t * LANES, gradient)
                    grad_offset = grad_offset + gradient
                store(grad_bias, b * width + channel, grad_offset)
                for t in range(positions):
                    gradient = splat(taps, 0.0)
                    for k in range(n_taps):
                        tap = load(taps, k * width + channel)
                        gradient = gradient + tap * load(inside, (t + n_taps - 1 - k) * LANES)
                    write(grad_x, b, begin + t, channel, gradient, count)
                for k in range(n_taps):
                    at = (b * n_taps + k) * width + channel
                    grad_tap = load(grad_taps, at)
                    for t in range(positions):
                        grad_tap = grad_tap + load(inside, t * LANES) * load(window, (t + k) * LANES)
                    store(grad_taps, at, grad_tap)
                for i in range(0, history, LANES):
                    store(later, later_at + i, load(inside, i))
        for block in range(max(first - b * blocks, 0), min(stop - b * blocks, blocks)):
            channel, later_at = block * LANES, (b * blocks + block) * history
            for j in range(n_taps - 1):
                gradient = splat(taps, 0.0)
                for k in range(j + 1):
                    gradient = gradient + load(taps, k * width + channel) * load(later, later_at + (j - k) * LANES)
                write(grad_before, b, j, channel, gradient, inner - channel)


@inline
def _fill_window(
    window: Any, x: Any, before: Any, b: int, begin: int, end: int, channel: int, count: int, n_taps: int
) -> None:
    """The inputs of positions begin - (K-1) to end, next to each other."""
    for t in range(begin - n_taps + 1, end):
        at = (t - begin + n_taps - 1) * LANES
        if t < 0:
            store(window, at, read(before, b, t + n_taps - 1, channel, count))
        else:
            fetch(x, b, t, channel + LANES)
            store(window, at, read(x, b, t, channel, count))


@inline
def _convolve(window: Any, t: int, taps: Any, bias: Any, channel: int, width: int, n_taps: int) -> Any:
    """The convolution at one position of the window, before SiLU."""
    value = load(bias, channel)
    for k in range(n_taps):
        value = value + load(window, (t + k) * LANES) * load(taps, k * width + channel)
    return value
