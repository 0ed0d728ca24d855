"""The gradient of the CPU's selective scan, by recomputation from the states at each chunk's start.

Chunks are taken from the last to the first. A block of LANES channels recomputes its states and decays four state
columns at a time, then runs the adjoint g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1} over the same four, so that what
lies between the two fits into the nearest cache. The gradients of B and C are sums over channels: within a chunk they
are kept as vectors over all blocks of a thread, whose lanes are added once at the chunk's end.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from yunmin.kernels.cpu_scan import CHUNK, share_begin
from yunmin.kernels.cpu_scan_columns import FOUR, adjoin_four, adjoin_one, recompute_four, recompute_one
from yunmin.kernels.jit import jit
from yunmin.kernels.rows import copy_rows, fetch, read, write
from yunmin.kernels.vector import LANES, load, sigmoid, softplus, splat, store, total

_LN_2 = 0.6931471805599453


@jit
def scan_backward(
    u: Any,
    raw_delta: Any,
    z: Any,
    B_ssm: Any,
    C_ssm: Any,
    A: Any,
    D_skip: Any,
    lengths: Any,
    starts: Any,
    grad_y: Any,
    adjoints: Any,
    grad_u: Any,
    grad_raw: Any,
    grad_z: Any,
    grad_B: Any,
    grad_C: Any,
    grad_A: Any,
    grad_D: Any,
    shape: Any,
    is_raw: bool,
    is_gated: bool,
    rank: int,
    size: int,
) -> None:
    """Writes the gradients of all inputs; see `scan_forward` for those.

    Args:
        u: as in the forward.
        raw_delta: as in the forward.
        z: as in the forward.
        B_ssm: as in the forward.
        C_ssm: as in the forward.
        A: as in the forward.
        D_skip: as in the forward.
        lengths: as in the forward.
        starts: states at each chunk's start, as the forward kept them.
        grad_y: rows (B, L, D).
        adjoints: gradient of the last states, becomes that of the first ones (B, blocks, N, LANES).
        grad_u: rows (B, L, D).
        grad_raw: rows (B, L, D).
        grad_z: rows (B, L, D), not written unless `is_gated`.
        grad_B: zeros (threads, B, L, N), becomes each thread's sum over its channels.
        grad_C: as grad_B.
        grad_A: zeros (B, blocks, N, LANES), becomes the sum over positions; of A itself, not of A log2(e).
        grad_D: zeros (B, blocks, LANES), likewise.
        shape: B, L, D, N.
        is_raw: as in the forward.
        is_gated: as in the forward.
        rank: of this thread.
        size: of the team.
    """
    batch, length, inner, n_states = shape
    assert size * batch * length * n_states <= grad_B.size
    blocks = (inner + LANES - 1) // LANES
    columns = n_states * LANES
    delta = np.empty(CHUNK * LANES, A.dtype)
    du = np.empty(CHUNK * LANES, A.dtype)
    dy = np.empty(CHUNK * LANES, A.dtype)  # gradient before the gate
    dz = np.empty(CHUNK * LANES, A.dtype)  # gradient of z over the ungated output
    sums = np.empty(CHUNK * LANES, A.dtype)  # ungated outputs
    grad_du = np.empty(CHUNK * LANES, A.dtype)
    grad_delta = np.empty(CHUNK * LANES, A.dtype)  # by way of the decay, over ln 2
    kept = np.empty((CHUNK + 1) * FOUR, A.dtype)  # states of four columns
    decays = np.empty(CHUNK * FOUR, A.dtype)
    B_chunk = np.empty(CHUNK * n_states, A.dtype)
    C_chunk = np.empty(CHUNK * n_states, A.dtype)
    B_sums = np.empty(CHUNK * columns, A.dtype)  # (N, CHUNK, LANES)
    C_sums = np.empty(CHUNK * columns, A.dtype)
    given = (delta, du, dy, B_chunk, C_chunk)
    wanted = (sums, grad_du, grad_delta, B_sums, C_sums)
    zero = splat(A, 0.0)
    first, stop = share_begin(batch * blocks, rank, size), share_begin(batch * blocks, rank + 1, size)
    for b in range(first // blocks, (stop + blocks - 1) // blocks):
        for chunk in range((length + CHUNK - 1) // CHUNK - 1, -1, -1):
            begin, end = chunk * CHUNK, min(chunk * CHUNK + CHUNK, length)
            real_end = max(begin, min(end, lengths[b]))
            real = real_end - begin
            copy_rows(B_ssm, b, begin, real_end, n_states, B_chunk)
            copy_rows(C_ssm, b, begin, real_end, n_states, C_chunk)
            B_sums[:] = 0.0
            C_sums[:] = 0.0
            for block in range(max(first - b * blocks, 0), min(stop - b * blocks, blocks)):
                channel, count = block * LANES, inner - block * LANES
                state_at = (b * blocks + block) * columns
                start_at = ((chunk * batch + b) * blocks + block) * columns
                skip = load(D_skip, channel)
                for t in range(real):
                    x = read(u, b, begin + t, channel, count)
                    step = read(raw_delta, b, begin + t, channel, count)
                    gradient = read(grad_y, b, begin + t, channel, count)
                    fetch(u, b, begin + t, channel + LANES)
                    fetch(raw_delta, b, begin + t, channel + LANES)
                    fetch(grad_y, b, begin + t, channel + LANES)
                    if is_raw:
                        step = softplus(step)
                    if is_gated:
                        fetch(z, b, begin + t, channel + LANES)
                        gate = read(z, b, begin + t, channel, count)
                        share = sigmoid(gate)
                        store(dz, t * LANES, gradient * (share * (1.0 + gate * (1.0 - share))))
                        gradient = gradient * (gate * share)
                    store(delta, t * LANES, step)
                    store(du, t * LANES, step * x)
                    store(dy, t * LANES, gradient)
                    store(sums, t * LANES, skip * x)
                    store(grad_du, t * LANES, zero)
                    store(grad_delta, t * LANES, zero)
                places = (block * columns, start_at, state_at)
                for n in range(0, n_states - 3, 4):
                    recompute_four(given, wanted, kept, decays, A, starts, places, n, n_states, real, count)
                    adjoin_four(given, wanted, kept, decays, A, adjoints, grad_A, places, n, n_states, real, count)
                for n in range(n_states - n_states % 4, n_states):
                    recompute_one(given, wanted, kept, decays, A, starts, places, n, n_states, real, count)
                    adjoin_one(given, wanted, kept, decays, A, adjoints, grad_A, places, n, n_states, real, count)
                grad_skip = load(grad_D, (b * blocks + block) * LANES)
                for t in range(real):
                    x = read(u, b, begin + t, channel, count)
                    gradient = load(dy, t * LANES)
                    of_du = load(grad_du, t * LANES)
                    grad_skip = grad_skip + gradient * x
                    write(grad_u, b, begin + t, channel, gradient * skip + of_du * load(delta, t * LANES), count)
                    of_delta = load(grad_delta, t * LANES) * _LN_2 + of_du * x
                    if is_raw:
                        of_delta = of_delta * sigmoid(read(raw_delta, b, begin + t, channel, count))
                    write(grad_raw, b, begin + t, channel, of_delta, count)
                    if is_gated:
                        write(grad_z, b, begin + t, channel, load(dz, t * LANES) * load(sums, t * LANES), count)
                store(grad_D, (b * blocks + block) * LANES, grad_skip)
                for t in range(real_end, end):
                    write(grad_u, b, t, channel, zero, count)
                    write(grad_raw, b, t, channel, zero, count)
                    if is_gated:
                        write(grad_z, b, t, channel, zero, count)
            for t in range(real):
                target = ((rank * batch + b) * length + begin + t) * n_states
                for n in range(n_states):
                    at = (n * CHUNK + t) * LANES
                    grad_B[target + n] = total(load(B_sums, at))
                    grad_C[target + n] = total(load(C_sums, at))
