"""Choosing a token from a row of logits, in one compiled call; see `yunmin.kernels.candidates` for terms and memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from yunmin.kernels.candidates import (
    CHUNK,
    LOWEST,
    at_least,
    best_k,
    collect,
    find_peaks,
    next_below,
    nucleus,
    sum_kept,
    weigh,
)
from yunmin.kernels.jit import inline, jit
from yunmin.kernels.vector import LANES, load, splat, store, total

NOT_FINITE, NONE_ALLOWED = -1, -2


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
        scores, peaks, weights, members, buckets, sums: memory, overwritten.

    Returns:
        The id, or NOT_FINITE where a logit is NaN or infinite, or NONE_ALLOWED.
    """
    if not _copy(row, scores):
        return NOT_FINITE
    _mask(allowed, row.size, scores)
    _adjust(scores, bias_ids, biases, seen_ids, seen_counts, repetition_penalty, presence_penalty, frequency_penalty)
    best = float(find_peaks(scores, peaks))
    if best == -np.inf:
        return NONE_ALLOWED
    if temperature == 0.0:
        return _first(scores, peaks, best)
    limit, last = LOWEST, scores.size
    if 0 < top_k < row.size:
        limit, last = best_k(scores, peaks, weights, best, top_k, members, buckets)
    weigh(scores, best, temperature, weights)
    if top_p < 1.0:
        limit, last = nucleus(scores, weights, best, temperature, top_p, limit, last, members, buckets, sums)
    if min_p > 0.0:
        low = at_least(best + temperature * np.log(min_p))
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
        scores, peaks, weights, members, buckets, sums: memory, overwritten.

    Returns:
        The log-probability of `token_id`; NaN where a logit is NaN or infinite.
    """
    if not _copy(row, scores):
        return np.nan
    best = float(find_peaks(scores, peaks))
    weigh(scores, best, 1.0, weights)
    base = best + np.log(sum_kept(scores, weights, LOWEST, scores.size, sums))
    if best_ids.size:
        limit, last = best_k(scores, peaks, weights, best, best_ids.size, members, buckets)
        n = collect(scores, next_below(limit), best, limit, last, members)
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
            scores[i] = min(max(float(scores[i]) + biases[j], LOWEST), -LOWEST)
    for j in range(ids.size):
        i = ids[j]
        score = float(scores[i])
        if score > -np.inf:
            score = score / repetition if score > 0.0 else score * repetition
            if counts[j] > 0:
                score -= frequency * counts[j] + presence
            scores[i] = min(max(score, LOWEST), -LOWEST)


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
def _draw(scores: Any, weights: Any, limit: Any, last: Any, draw: Any, sums: Any) -> Any:
    """The lowest id at which the mass of what is kept exceeds `draw` times the whole."""
    goal = draw * sum_kept(scores, weights, limit, last, sums)
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
