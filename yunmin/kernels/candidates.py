"""Candidates of a row of scores, and filters that keep the best of them without sorting all.

Scores are logits as adjusted by biases and penalties, -inf where a token is not allowed. Candidates stand in order of
their scores, those of equal scores in order of their ids. Each filter keeps the first ones in that order, so that its
result is told by the last one kept: `limit`, its score, and `last`, its id (of those with that very score, the higher
ids are not kept). Weights are exp((score - best) / temperature), in float64, as is every sum of them.

Everything works on memory of a fixed size, whole chunks of it: `scores` float32 (P), `peaks` float32 (P / LANES),
`weights` float64 (P), `members` int32 (P), `buckets` float64 (BUCKETS), `sums` float64 (P / CHUNK), with P the row's
size rounded up to a multiple of CHUNK.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from yunmin.kernels.comparisons import any_between, take_above, take_from, to_double
from yunmin.kernels.jit import inline
from yunmin.kernels.vector import LANES, LOG2_E, exp2, larger, largest, load, splat, store, total

CHUNK = 16 * LANES  # scores that one partial sum and LANES peaks stand for
BUCKETS = 1024
LOWEST = float(np.finfo(np.float32).min)

_FEW = 300  # candidates that are looked at one by one rather than by another pass over all
_DOUBLINGS = 8
_STEEPEST = 1e300  # in place of 1 / temperature where that is more: nothing changes but that no product is NaN


@inline
def find_peaks(scores: Any, peaks: Any) -> Any:
    """The best of every LANES-th score of each chunk; returns the best of all."""
    top = splat(scores, -np.inf)
    for start in range(0, scores.size, CHUNK):
        high = load(scores, start)
        for at in range(start + LANES, start + CHUNK, LANES):
            high = larger(load(scores, at), high)
        store(peaks, start // CHUNK * LANES, high)
        top = larger(high, top)
    return largest(top)


@inline
def weigh(scores: Any, best: Any, temperature: Any, weights: Any) -> Any:
    rate = min(LOG2_E / temperature, _STEEPEST)
    for at in range(0, scores.size, LANES):
        store(weights, at, exp2((to_double(load(scores, at)) - best) * rate))


@inline
def best_k(scores: Any, peaks: Any, weights: Any, best: Any, k: Any, members: Any, buckets: Any) -> Any:
    """The last of the k best, as `limit` and `last`."""
    lowest_peak = best
    for peak in peaks:
        if peak > -np.inf:
            lowest_peak = min(lowest_peak, float(peak))
    low, goal = -np.inf, float(k)
    depth = best - lowest_peak  # a first guess at how far down k scores reach
    for _ in range(_DOUBLINGS):
        bound = float(np.float32(best - depth))
        if _above(scores, weights, True, bound)[0] >= goal:
            low = bound
            break
        depth *= 2.0
    low, high, number = _narrow(scores, weights, True, low, best, goal)
    n = collect(scores, low, high, LOWEST, scores.size, members)
    return _cut(scores, weights, True, members, n, number, goal, buckets)


@inline
def nucleus(
    scores: Any,
    weights: Any,
    best: Any,
    temperature: Any,
    top_p: Any,
    limit: Any,
    last: Any,
    members: Any,
    buckets: Any,
    sums: Any,
) -> Any:
    """The last of the fewest best that have `top_p` of the mass of what is kept, as `limit` and `last`."""
    mass = sum_kept(scores, weights, limit, last, sums)
    goal = top_p * mass
    # all that weigh less than this are together less than what may go, and none of them is needed
    lightest = (1.0 - top_p) * mass / scores.size
    low = next_below(max(best + temperature * (np.log(lightest) - 1e-9), LOWEST))
    low, high, above = _narrow(scores, weights, False, max(low, next_below(limit)), best, goal)
    n = collect(scores, low, high, limit, last, members)
    if n == 0:  # rounding can have it so where top_p is nearly 1
        return limit, last
    return _cut(scores, weights, False, members, n, above, goal, buckets)


@inline
def sum_kept(scores: Any, weights: Any, limit: Any, last: Any, sums: Any) -> Any:
    """The mass of what is kept, by chunks; returns the whole."""
    whole = 0.0
    for chunk in range(sums.size):
        start = chunk * CHUNK
        mass = splat(weights, 0.0)
        if start + CHUNK <= last + 1:
            for at in range(start, start + CHUNK, LANES):
                mass = mass + take_from(load(weights, at), limit, load(scores, at))
            sums[chunk] = total(mass)
        else:
            for at in range(start, start + CHUNK, LANES):
                mass = mass + take_above(load(weights, at), limit, load(scores, at))
            sums[chunk] = total(mass)
            for i in range(start, last + 1):
                if scores[i] == limit:
                    sums[chunk] += weights[i]
        whole += sums[chunk]
    return whole


@inline
def collect(scores: Any, low: Any, high: Any, limit: Any, last: Any, members: Any) -> Any:
    """Ids, ascending, of the scores above `low` and not above `high` that are kept; returns how many.

    No number lies between `low` and `limit`, or `low` is the higher one.
    """
    n = 0
    for start in range(0, scores.size, LANES):
        if any_between(load(scores, start), low, high):
            for i in range(start, start + LANES):
                members[n] = i
                n += (scores[i] > low) & (scores[i] <= high) & ((scores[i] != limit) | (i <= last))
    return n


@inline
def next_below(bound: Any) -> Any:
    """A float32 below a number, with at most one other between."""
    return float(np.nextafter(np.float32(bound), np.float32(-np.inf)))


@inline
def at_least(bound: Any) -> Any:
    """The lowest float32 that is not below a number."""
    low = np.float32(bound)
    return float(low) if low >= bound else float(np.nextafter(low, np.float32(np.inf)))


@inline
def _above(scores: Any, weights: Any, counted: Any, bound: Any) -> Any:
    """How many scores lie above a bound, and their mass, which is their number where each one counts 1."""
    one, number = splat(scores, 1.0), splat(scores, 0.0)  # float32 counts exactly, up to 2^24
    if counted:
        for at in range(0, scores.size, LANES):
            number = number + take_above(one, bound, load(scores, at))
        return float(total(number)), float(total(number))
    mass = splat(weights, 0.0)
    for at in range(0, scores.size, LANES):
        x = load(scores, at)
        number = number + take_above(one, bound, x)
        mass = mass + take_above(load(weights, at), bound, x)
    return float(total(number)), total(mass)


@inline
def _narrow(scores: Any, weights: Any, counted: Any, low: Any, high: Any, goal: Any) -> Any:
    """Halves an interval in which the mass from the best on reaches `goal`, until few scores lie there.

    The interval is open at `low` and closed at `high`.

    Returns:
        Both bounds, and the mass above the interval.
    """
    below, above, mass = _above(scores, weights, counted, low)[0], 0.0, 0.0
    while below - above > _FEW:
        middle = float(np.float32(0.5 * (low + high)))
        if middle <= low or middle >= high:
            break
        number, heavier = _above(scores, weights, counted, middle)
        if heavier < goal:
            high, above, mass = middle, number, heavier
        else:
            low, below = middle, number
    return low, high, mass


@inline
def _cut(scores: Any, weights: Any, counted: Any, members: Any, n: Any, mass: Any, goal: Any, buckets: Any) -> Any:
    """Finds the member at which the mass from the best on reaches `goal`.

    Sorts into buckets by score and goes on with the one in which that happens, until all in it have the same score.

    Args:
        scores: finite where it matters.
        weights: not read where each one counts 1.
        counted: whether each one counts 1.
        members: ids, ascending; overwritten.
        n: how many, at least one.
        mass: of what is better than all of them.
        goal: above `mass`. If the members do not reach it, the last one is taken.
        buckets: overwritten.

    Returns:
        Its score and its id.
    """
    while True:
        low = high = float(scores[members[0]])
        for j in range(1, n):
            score = float(scores[members[j]])
            low, high = min(low, score), max(high, score)
        if low == high:
            last = members[0]
            for j in range(n):
                last = members[j]
                mass += 1.0 if counted else weights[last]
                if mass >= goal:
                    break
            return low, last
        scale = BUCKETS / (high - low)
        buckets[:] = 0.0
        for j in range(n):
            i = members[j]
            buckets[min(BUCKETS - 1, int((high - scores[i]) * scale))] += 1.0 if counted else weights[i]
        bucket = 0
        while bucket < BUCKETS - 1 and mass + buckets[bucket] < goal:  # the last bucket has the lowest score
            mass += buckets[bucket]
            bucket += 1
        remaining = 0
        for j in range(n):
            i = members[j]
            members[remaining] = i
            remaining += min(BUCKETS - 1, int((high - scores[i]) * scale)) == bucket
        n = remaining
