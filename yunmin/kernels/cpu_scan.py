"""The selective scan on the CPU: step sizes, recurrence, skip and gate in one pass; memory beside it is constant.

Work is divided into blocks of LANES channels. Within a chunk of CHUNK positions, a block first computes what does not
depend on the state, then runs its state columns four at a time, so that their states stay in registers.

What has few numbers comes in blocks: A is (blocks, N, LANES), D_skip (blocks, LANES), states (B, blocks, N, LANES). A
is multiplied by log2(e), so that exp(delta A) is a power of two. What has many comes in rows, see
`yunmin.kernels.rows`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from yunmin.kernels.jit import inline, jit
from yunmin.kernels.rows import copy_rows, fetch, read, spread, write
from yunmin.kernels.vector import LANES, exp2, load, silu, softplus, splat, store

CHUNK = 64  # positions; also the distance between the states that are kept for the backward


@inline
def share_begin(items: int, rank: int, size: int) -> int:
    """Where one thread's part of a range of items begins; the next one's begin is its end."""
    return items * rank // size


@jit
def scan_forward(
    u: Any,
    raw_delta: Any,
    z: Any,
    B_ssm: Any,
    C_ssm: Any,
    A: Any,
    D_skip: Any,
    lengths: Any,
    y: Any,
    states: Any,
    starts: Any,
    shape: Any,
    is_raw: bool,
    is_gated: bool,
    rank: int,
    size: int,
) -> None:
    """Writes y, moves the states to the end, and keeps those at each chunk's start where `starts` has room for them.

    Args:
        u: inputs, rows (B, L, D).
        raw_delta: step sizes before softplus (`is_raw`) or after it, rows (B, L, D).
        z: gates before SiLU, rows (B, L, D); not read unless `is_gated`.
        B_ssm: input maps, rows (B, L, N).
        C_ssm: output maps, rows (B, L, N).
        A: decay rates times log2(e), (blocks, N, LANES).
        D_skip: skip weights (blocks, LANES).
        lengths: int64 (B,), positions that are real.
        y: outputs, rows (B, L, D); zero from a sequence's length on.
        states: (B, blocks, N, LANES).
        starts: (chunks, B, blocks, N, LANES), or empty.
        shape: B, L, D, N.
        is_raw: whether step sizes need softplus.
        is_gated: whether y is multiplied by SiLU(z).
        rank: of this thread.
        size: of the team.
    """
    batch, length, inner, n_states = shape
    blocks = (inner + LANES - 1) // LANES
    columns = n_states * LANES  # numbers in a block's state
    delta = np.empty(CHUNK * LANES, A.dtype)
    du = np.empty(CHUNK * LANES, A.dtype)
    sums = np.empty(CHUNK * LANES, A.dtype)
    B_chunk = np.empty(CHUNK * n_states, A.dtype)
    C_chunk = np.empty(CHUNK * n_states, A.dtype)
    work = (delta, du, sums, B_chunk, C_chunk)
    first, stop = share_begin(batch * blocks, rank, size), share_begin(batch * blocks, rank + 1, size)
    for b in range(first // blocks, (stop + blocks - 1) // blocks):
        for begin in range(0, length, CHUNK):
            end = min(begin + CHUNK, length)
            real_end = max(begin, min(end, lengths[b]))
            real = real_end - begin
            copy_rows(B_ssm, b, begin, real_end, n_states, B_chunk)
            copy_rows(C_ssm, b, begin, real_end, n_states, C_chunk)
            for block in range(max(first - b * blocks, 0), min(stop - b * blocks, blocks)):
                channel, count = block * LANES, inner - block * LANES
                state_at = (b * blocks + block) * columns
                if starts.size > 0:
                    kept_at = ((begin // CHUNK * batch + b) * blocks + block) * columns
                    for i in range(0, columns, LANES):
                        store(starts, kept_at + i, load(states, state_at + i))
                skip = load(D_skip, channel)
                for t in range(real):
                    x = read(u, b, begin + t, channel, count)
                    step = read(raw_delta, b, begin + t, channel, count)
                    if is_raw:
                        step = softplus(step)
                    fetch(u, b, begin + t, channel + LANES)
                    fetch(raw_delta, b, begin + t, channel + LANES)
                    if is_gated:
                        fetch(z, b, begin + t, channel + LANES)
                    store(delta, t * LANES, step)
                    store(du, t * LANES, step * x)
                    store(sums, t * LANES, skip * x)
                for n in range(0, n_states - 3, 4):
                    _run_four(work, A, block * columns, states, state_at, n, n_states, real)
                for n in range(n_states - n_states % 4, n_states):
                    _run_one(work, A, block * columns, states, state_at, n, n_states, real)
                for t in range(real):
                    output = load(sums, t * LANES)
                    if is_gated:
                        output = output * silu(read(z, b, begin + t, channel, count))
                    write(y, b, begin + t, channel, output, count)
                for t in range(real_end, end):
                    write(y, b, t, channel, splat(skip, 0.0), count)


@inline
def _run_four(work: Any, A: Any, A_at: int, states: Any, state_at: int, first: int, n_states: int, real: int) -> None:
    """Four state columns over a chunk: h = exp(delta A) h + du B, sums += C h."""
    delta, du, sums, B, C = work
    A_at, state_at = A_at + first * LANES, state_at + first * LANES
    A0, h0 = load(A, A_at), load(states, state_at)
    A1, h1 = load(A, A_at + LANES), load(states, state_at + LANES)
    A2, h2 = load(A, A_at + 2 * LANES), load(states, state_at + 2 * LANES)
    A3, h3 = load(A, A_at + 3 * LANES), load(states, state_at + 3 * LANES)
    for t in range(real):
        step, increment, n = load(delta, t * LANES), load(du, t * LANES), t * n_states + first
        h0 = exp2(step * A0) * h0 + increment * spread(B, n)
        h1 = exp2(step * A1) * h1 + increment * spread(B, n + 1)
        h2 = exp2(step * A2) * h2 + increment * spread(B, n + 2)
        h3 = exp2(step * A3) * h3 + increment * spread(B, n + 3)
        output = (h0 * spread(C, n) + h1 * spread(C, n + 1)) + (h2 * spread(C, n + 2) + h3 * spread(C, n + 3))
        store(sums, t * LANES, load(sums, t * LANES) + output)
    store(states, state_at, h0)
    store(states, state_at + LANES, h1)
    store(states, state_at + 2 * LANES, h2)
    store(states, state_at + 3 * LANES, h3)


@inline
def _run_one(work: Any, A: Any, A_at: int, states: Any, state_at: int, column: int, n_states: int, real: int) -> None:
    """As `_run_four`, one column."""
    delta, du, sums, B, C = work
    rate, h = load(A, A_at + column * LANES), load(states, state_at + column * LANES)
    for t in range(real):
        n = t * n_states + column
        h = exp2(load(delta, t * LANES) * rate) * h + load(du, t * LANES) * spread(B, n)
        store(sums, t * LANES, load(sums, t * LANES) + h * spread(C, n))
    store(states, state_at + column * LANES, h)
