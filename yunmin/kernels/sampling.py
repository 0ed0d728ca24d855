"""Choosing a token from a row of logits, without sorting the vocabulary.

Scores are the logits as adjusted by biases and penalties, -inf where a token is not allowed. Candidates stand in order
of their scores, those of equal scores in order of their ids. Each filter keeps the first ones in that order, so that
its result is told by the last one kept: `limit`, its score, and `last`, its id (of those with that very score, the
higher ids are not kept). Weights are exp((score - best) / temperature), in float64, as is every sum of them.

Everything works on memory of a fixed size, whole chunks of it: `scores` float32 (P), `peaks` float32 (P / LANES),
`weights` float64 (P), `members` int32 (P), `buckets` float64 (BUCKETS), `sums` float64 (P / CHUNK), with P the row's
size rounded up to a multiple of CHUNK.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from yunmin.kernels.comparisons import any_between, take_above, take_from, to_double
from yunmin.kernels.jit import inline, jit
from yunmin.kernels.vector import LANES, LOG2_E, exp2, larger, largest, load, splat, store, total

CHUNK = 16 * LANES  # scores that one partial sum and LANES peaks stand for
BUCKETS = 1024
NOT_FINITE, NONE_ALLOWED = -1, -2

_LOWEST = float(np.finfo(np.float32).min)
_FEW = 300  # candidates that are looked at one by one rather than by another pass over all
_DOUBLINGS = 8
_STEEPEST = 1e300  # in place of 1 / temperature where that is more: nothing changes but that no product is NaN


@jit
def choose(
    row: Any,
    draw: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    allowed: Any,
    bias_ids: Any,
    biases: Any,
    seen_ids: Any,
    seen_counts: Any,
    repetition_penalty: float,
    presence_penalty: float,
    frequency_penalty: float,
    scores: Any,
    peaks: Any,
    weights: Any,
    members: Any,
    buckets: Any,
    sums: Any,
) -> Any:
    """Chooses a token: mask, bias, penalties, temperature, then top-k, top-p, min-p, then the draw.

    Args:
        row: logits, float32 (V,), contiguous.
        draw: in [0, 1); not used at temperature 0.
        temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty: as in
            `SamplingParams`.
        allowed: a bit for each id, uint32, or of size 0 where all are.
        bias_ids: int32 (n,).
        biases: what is added to their logits, float64 (n,).
        seen_ids: distinct ids that penalties apply to, int32 (n,).
        seen_counts: how often each was generated, int32 (n,).
        scores, peaks, weights, members, buckets, sums: memory as above, overwritten.

    Returns:
        The id, or NOT_FINITE where a logit is NaN or infinite, or NONE_ALLOWED.
    """
    if not _copy(row, scores):
        return NOT_FINITE
    _mask(allowed, row.size, scores)
    _adjust(scores, bias_ids, biases, seen_ids, seen_counts, repetition_penalty, presence_penalty, frequency_penalty)
    best = float(_find_peaks(scores, peaks))
    if best == -np.inf:
        return NONE_ALLOWED
    if temperature == 0.0:
        return _first(scores, peaks, best)
    limit, last = _LOWEST, scores.size
    if 0 < top_k < row.size:
        limit, last = _best_k(scores, peaks, weights, best, top_k, members, buckets)
    _weigh(scores, best, temperature, weights)
    if top_p < 1.0:
        limit, last = _nucleus(scores, weights, best, temperature, top_p, limit, last, members, buckets, sums)
    if min_p > 0.0:
        low = _at_least(best + temperature * np.log(min_p))
        if low > limit:
            limit, last = low, scores.size
    return _draw(scores, weights, limit, last, draw, sums)


@jit
def log_probabilities(
    row: Any,
    token_id: int,
    best_ids: Any,
    best_values: Any,
    scores: Any,
    peaks: Any,
    weights: Any,
    members: Any,
    buckets: Any,
    sums: Any,
) -> Any:
    """The log-softmax of a row at one id and at the best ones.

    Args:
        row: logits, float32 (V,), contiguous.
        token_id: the one.
        best_ids: int32 (n,), n at most V; the best ids are written here, the best first.
        best_values: float64 (n,); so are their log-probabilities.
        scores, peaks, weights, members, buckets, sums: memory as above, overwritten.

    Returns:
        The log-probability of `token_id`; NaN where a logit is NaN or infinite.
    """
    if not _copy(row, scores):
        return np.nan
    best = float(_find_peaks(scores, peaks))
    _weigh(scores, best, 1.0, weights)
    base = best + np.log(_sum_kept(scores, weights, _LOWEST, scores.size, sums))
    if best_ids.size:
        limit, last = _best_k(scores, peaks, weights, best, best_ids.size, members, buckets)
        n = _collect(scores, _next_below(limit), best, limit, last, members)
        for place in range(best_ids.size):
            top = place
            for j in range(place + 1, n):
                challenger, champion = scores[members[j]], scores[members[top]]
                if challenger > champion or (challenger == champion and members[j] < members[top]):
                    top = j
            members[place], members[top] = members[top], members[place]
            best_ids[place] = members[place]
            best_values[place] = scores[members[place]] - base
    return row[token_id] - base


@inline
def _copy(row: Any, scores: Any) -> Any:
    """Copies a row, with -inf behind its end; returns whether every logit is finite."""
    n = row.size
    whole = n // LANES * LANES
    odd = splat(row, 0.0)
    for at in range(0, whole, LANES):
        x = load(row, at)
        odd = odd + (x - x)  # NaN for infinity and NaN
        store(scores, at, x)
    wrong = total(odd)
    for i in range(whole, n):
        wrong += row[i] - row[i]
        scores[i] = row[i]
    for i in range(n, scores.size):
        scores[i] = -np.inf
    return wrong == 0.0


@inline
def _mask(allowed: Any, n: Any, scores: Any) -> Any:
    for word in range(min(allowed.size, (n + 31) // 32)):
        bits = np.int64(allowed[word])
        if bits == 0xFFFFFFFF:
            continue
        for i in range(32 * word, min(32 * word + 32, n)):
            if not bits >> (i & 31) & 1:
                scores[i] = -np.inf


@inline
def _adjust(
    scores: Any, bias_ids: Any, biases: Any, ids: Any, counts: Any, repetition: Any, presence: Any, frequency: Any
) -> Any:
    """Biases, then penalties; what was finite stays so."""
    for j in range(bias_ids.size):
        i = bias_ids[j]
        if scores[i] > -np.inf:
            scores[i] = min(max(float(scores[i]) + biases[j], _LOWEST), -_LOWEST)
    for j in range(ids.size):
        i = ids[j]
        score = float(scores[i])
        if score > -np.inf:
            score = score / repetition if score > 0.0 else score * repetition
            if counts[j] > 0:
                score -= frequency * counts[j] + presence
            scores[i] = min(max(score, _LOWEST), -_LOWEST)


@inline
def _find_peaks(scores: Any, peaks: Any) -> Any:
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
def _first(scores: Any, peaks: Any, best: Any) -> Any:
    """The lowest id with the best score."""
    peak = 0
    while peaks[peak] != best:
        peak += 1
    i = peak // LANES * CHUNK
    while scores[i] != best:
        i += 1
    return i


@inline
def _weigh(scores: Any, best: Any, temperature: Any, weights: Any) -> Any:
    rate = min(LOG2_E / temperature, _STEEPEST)
    for at in range(0, scores.size, LANES):
        store(weights, at, exp2((to_double(load(scores, at)) - best) * rate))


@inline
def _best_k(scores: Any, peaks: Any, weights: Any, best: Any, k: Any, members: Any, buckets: Any) -> Any:
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
    n = _collect(scores, low, high, _LOWEST, scores.size, members)
    return _cut(scores, weights, True, members, n, number, goal, buckets)


@inline
def _nucleus(
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
    mass = _sum_kept(scores, weights, limit, last, sums)
    goal = top_p * mass
    # all that weigh less than this are together less than what may go, and none of them is needed
    lightest = (1.0 - top_p) * mass / scores.size
    low = _next_below(max(best + temperature * (np.log(lightest) - 1e-9), _LOWEST))
    low, high, above = _narrow(scores, weights, False, max(low, _next_below(limit)), best, goal)
    n = _collect(scores, low, high, limit, last, members)
    if n == 0:  # rounding can have it so where top_p is nearly 1
        return limit, last
    return _cut(scores, weights, False, members, n, above, goal, buckets)


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
def _collect(scores: Any, low: Any, high: Any, limit: Any, last: Any, members: Any) -> Any:
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


@inline
def _next_below(bound: Any) -> Any:
    """A float32 below a number, with at most one other between."""
    return float(np.nextafter(np.float32(bound), np.float32(-np.inf)))


@inline
def _at_least(bound: Any) -> Any:
    """The lowest float32 that is not below a number."""
    low = np.float32(bound)
    return float(low) if low >= bound else float(np.nextafter(low, np.float32(np.inf)))


@inline
def _sum_kept(scores: Any, weights: Any, limit: Any, last: Any, sums: Any) -> Any:
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
def _draw(scores: Any, weights: Any, limit: Any, last: Any, draw: Any, sums: Any) -> Any:
    """The lowest id at which the mass of what is kept exceeds `draw` times the whole."""
    goal = draw * _sum_kept(scores, weights, limit, last, sums)
    chosen, before, reached = 0, 0.0, 0.0
    for chunk in range(sums.size):
        if sums[chunk] > 0.0:
            chosen, before = chunk, reached
            reached += sums[chunk]
            if reached > goal:
                break
    token = -1
    for i in range(chosen * CHUNK, (chosen + 1) * CHUNK):
        if weights[i] > 0.0 and (scores[i] > limit or (scores[i] == limit and i <= last)):
            token = i  # the last one, where rounding keeps the sum from getting there
            before += weights[i]
            if before > goal:
                break
    return token
