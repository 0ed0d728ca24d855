"""State columns of one block of channels over one chunk: states again from the chunk's start, adjoints from its end.

Everything is kept as (position, LANES), `kept` and `decays` for as many columns as run at once. `given` holds delta,
delta u, the gradient of the ungated outputs, and B and C as (position, N). `wanted` holds the ungated outputs, the
gradients of delta u and (by way of the decays, over ln 2) of delta, and those of B and C as (N, CHUNK, LANES), with
lanes yet to be added. `places` says where the block's part of A, of the kept starts and of the states begins.
"""

from __future__ import annotations

from typing import Any

from yunmin.kernels.cpu_scan import CHUNK
from yunmin.kernels.jit import inline
from yunmin.kernels.rows import first_lanes, spread
from yunmin.kernels.vector import LANES, exp2, load, store

FOUR = 4 * LANES  # numbers that four columns keep for each position


@inline
def recompute_four(
    given: Any,
    wanted: Any,
    kept: Any,
    decays: Any,
    A: Any,
    starts: Any,
    places: Any,
    first: int,
    n_states: int,
    real: int,
    count: int,
) -> None:
    """States and decays of four columns over a chunk, their share of the outputs and the gradient of C."""
    delta, du, dy, B, C = given
    sums, C_sums = wanted[0], wanted[4]
    A_at, start_at = places[0] + first * LANES, places[1] + first * LANES
    A0, h0 = load(A, A_at), load(starts, start_at)
    A1, h1 = load(A, A_at + LANES), load(starts, start_at + LANES)
    A2, h2 = load(A, A_at + 2 * LANES), load(starts, start_at + 2 * LANES)
    A3, h3 = load(A, A_at + 3 * LANES), load(starts, start_at + 3 * LANES)
    _store_four(kept, 0, h0, h1, h2, h3)
    for t in range(real):
        step, increment, gradient = load(delta, t * LANES), load(du, t * LANES), load(dy, t * LANES)
        n = t * n_states + first
        a0 = exp2(step * A0)
        a1 = exp2(step * A1)
        a2 = exp2(step * A2)
        a3 = exp2(step * A3)
        h0 = a0 * h0 + increment * spread(B, n)
        h1 = a1 * h1 + increment * spread(B, n + 1)
        h2 = a2 * h2 + increment * spread(B, n + 2)
        h3 = a3 * h3 + increment * spread(B, n + 3)
        _store_four(decays, t * FOUR, a0, a1, a2, a3)
        _store_four(kept, t * FOUR + FOUR, h0, h1, h2, h3)
        _add_four(C_sums, first, t, h0 * gradient, h1 * gradient, h2 * gradient, h3 * gradient, count)
        output = (h0 * spread(C, n) + h1 * spread(C, n + 1)) + (h2 * spread(C, n + 2) + h3 * spread(C, n + 3))
        store(sums, t * LANES, load(sums, t * LANES) + output)


@inline
def adjoin_four(
    given: Any,
    wanted: Any,
    kept: Any,
    decays: Any,
    A: Any,
    adjoints: Any,
    grad_A: Any,
    places: Any,
    first: int,
    n_states: int,
    real: int,
    count: int,
) -> None:
    """The adjoints of four columns from the chunk's end to its start, and what follows from them."""
    delta, du, dy, B, C = given
    grad_du, grad_delta, B_sums = wanted[1], wanted[2], wanted[3]
    A_at, at = places[0] + first * LANES, places[2] + first * LANES
    A0, carried0, of_A0 = load(A, A_at), load(adjoints, at), load(grad_A, at)
    A1, carried1, of_A1 = load(A, A_at + LANES), load(adjoints, at + LANES), load(grad_A, at + LANES)
    A2, carried2, of_A2 = load(A, A_at + 2 * LANES), load(adjoints, at + 2 * LANES), load(grad_A, at + 2 * LANES)
    A3, carried3, of_A3 = load(A, A_at + 3 * LANES), load(adjoints, at + 3 * LANES), load(grad_A, at + 3 * LANES)
    for t in range(real - 1, -1, -1):
        step, increment, gradient = load(delta, t * LANES), load(du, t * LANES), load(dy, t * LANES)
        n, row = t * n_states + first, t * FOUR
        g0 = carried0 + gradient * spread(C, n)
        g1 = carried1 + gradient * spread(C, n + 1)
        g2 = carried2 + gradient * spread(C, n + 2)
        g3 = carried3 + gradient * spread(C, n + 3)
        _add_four(B_sums, first, t, g0 * increment, g1 * increment, g2 * increment, g3 * increment, count)
        of_du = (g0 * spread(B, n) + g1 * spread(B, n + 1)) + (g2 * spread(B, n + 2) + g3 * spread(B, n + 3))
        store(grad_du, t * LANES, load(grad_du, t * LANES) + of_du)
        carried0 = g0 * load(decays, row)
        carried1 = g1 * load(decays, row + LANES)
        carried2 = g2 * load(decays, row + 2 * LANES)
        carried3 = g3 * load(decays, row + 3 * LANES)
        # gradients of the exponents delta A
        e0 = carried0 * load(kept, row)
        e1 = carried1 * load(kept, row + LANES)
        e2 = carried2 * load(kept, row + 2 * LANES)
        e3 = carried3 * load(kept, row + 3 * LANES)
        store(grad_delta, t * LANES, load(grad_delta, t * LANES) + ((e0 * A0 + e1 * A1) + (e2 * A2 + e3 * A3)))
        of_A0 = of_A0 + e0 * step
        of_A1 = of_A1 + e1 * step
        of_A2 = of_A2 + e2 * step
        of_A3 = of_A3 + e3 * step
    _store_four(adjoints, at, carried0, carried1, carried2, carried3)
    _store_four(grad_A, at, of_A0, of_A1, of_A2, of_A3)


@inline
def recompute_one(
    given: Any,
    wanted: Any,
    kept: Any,
    decays: Any,
    A: Any,
    starts: Any,
    places: Any,
    column: int,
    n_states: int,
    real: int,
    count: int,
) -> None:
    """As `recompute_four`, one column."""
    delta, du, dy, B, C = given
    sums, C_sums = wanted[0], wanted[4]
    rate, h = load(A, places[0] + column * LANES), load(starts, places[1] + column * LANES)
    store(kept, 0, h)
    for t in range(real):
        n = t * n_states + column
        a = exp2(load(delta, t * LANES) * rate)
        h = a * h + load(du, t * LANES) * spread(B, n)
        store(decays, t * LANES, a)
        store(kept, t * LANES + LANES, h)
        _add(C_sums, column, t, h * load(dy, t * LANES), count)
        store(sums, t * LANES, load(sums, t * LANES) + h * spread(C, n))


@inline
def adjoin_one(
    given: Any,
    wanted: Any,
    kept: Any,
    decays: Any,
    A: Any,
    adjoints: Any,
    grad_A: Any,
    places: Any,
    column: int,
    n_states: int,
    real: int,
    count: int,
) -> None:
    """As `adjoin_four`, one column."""
    delta, du, dy, B, C = given
    grad_du, grad_delta, B_sums = wanted[1], wanted[2], wanted[3]
    rate, at = load(A, places[0] + column * LANES), places[2] + column * LANES
    carried, of_A = load(adjoints, at), load(grad_A, at)
    for t in range(real - 1, -1, -1):
        n = t * n_states + column
        g = carried + load(dy, t * LANES) * spread(C, n)
        _add(B_sums, column, t, g * load(du, t * LANES), count)
        store(grad_du, t * LANES, load(grad_du, t * LANES) + g * spread(B, n))
        carried = g * load(decays, t * LANES)
        e = carried * load(kept, t * LANES)
        store(grad_delta, t * LANES, load(grad_delta, t * LANES) + e * rate)
        of_A = of_A + e * load(delta, t * LANES)
    store(adjoints, at, carried)
    store(grad_A, at, of_A)


@inline
def _store_four(array: Any, at: int, v0: Any, v1: Any, v2: Any, v3: Any) -> None:
    store(array, at, v0)
    store(array, at + LANES, v1)
    store(array, at + 2 * LANES, v2)
    store(array, at + 3 * LANES, v3)


@inline
def _add(sums: Any, column: int, t: int, value: Any, count: int) -> None:
    """Adds a vector, without the lanes beyond a row's end: zero times infinity would not be zero there."""
    at = (column * CHUNK + t) * LANES
    store(sums, at, load(sums, at) + first_lanes(value, count))


@inline
def _add_four(sums: Any, first: int, t: int, v0: Any, v1: Any, v2: Any, v3: Any, count: int) -> None:
    _add(sums, first, t, v0, count)
    _add(sums, first + 1, t, v1, count)
    _add(sums, first + 2, t, v2, count)
    _add(sums, first + 3, t, v3, count)
