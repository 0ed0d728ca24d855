"""What is often claimed of pruning with adapters, held against what was measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from research.ablation.comparisons import compare_memory
from research.ablation.outcome import Outcome, has_pillar
from research.reports.significance import Paired
from research.reports.words import change, count, interval, percent

FEWER_TRAINABLE = (0.7, 0.9)
SPARSITY = (0.3, 0.7)


@dataclass(frozen=True)
class Claim:
    """A claim and its check.

    Attributes:
        text: the claim.
        found: the numbers.
        verdict: `holds`, `holds in part`, `does not hold`, `not shown` (too few or too noisy), or `not measured`.
    """

    text: str
    found: str
    verdict: str


def check_claims(outcomes: Sequence[Outcome]) -> list[Claim]:
    """Checks the classic claims, each in every way in which it can be meant."""
    low, high = FEWER_TRAINABLE
    fewer = f"{100 * low:.0f}–{100 * high:.0f} % fewer trainable parameters with adapters"
    return [
        _fewer_trainable(outcomes, f"{fewer}, in the last phase", lambda outcome: outcome.adapted),
        _fewer_trainable(outcomes, f"{fewer}, in the phase that trains most", lambda outcome: outcome.trainable),
        _sparsity(outcomes),
        *(_less_memory(outcomes, combination) for combination in ("peft", "masking+peft", "all")),
    ]


def _fewer_trainable(outcomes: Sequence[Outcome], text: str, counted: Callable[[Outcome], int | None]) -> Claim:
    dense = {o.seed: o.trainable for o in outcomes if o.combination == "baseline" and o.trainable}
    changes = [
        value / whole - 1
        for outcome in outcomes
        if has_pillar(outcome.combination, "peft")
        and (whole := dense.get(outcome.seed))
        and (value := counted(outcome)) is not None
    ]
    if not changes:
        return Claim(text, "no experiment with adapters beside a baseline of its seed", "not measured")
    low, high = FEWER_TRAINABLE
    reached, beyond = sum(c <= -low for c in changes), sum(c < -high for c in changes)
    found = (
        f"{change(statistics.median(changes))} at the median, {change(min(changes))} to {change(max(changes))} in "
        f"{count(len(changes), 'experiment')}, against the baseline of their seed; at least {100 * low:.0f} % fewer in "
        f"{reached}, more than {100 * high:.0f} % fewer in {beyond}"
    )
    return Claim(text, found, _verdict(reached, len(changes)))


def _sparsity(outcomes: Sequence[Outcome]) -> Claim:
    low, high = SPARSITY
    text = f"{100 * low:.0f}–{100 * high:.0f} % sparsity by layer"
    baselines = {o.seed: o.perplexity["float32"] for o in outcomes if o.combination == "baseline"}
    layers, rises, spreads = [], [], []
    for outcome in outcomes:
        found = (outcome.result.get("layers") or {}).get("channel_sparsity")
        if not found or not has_pillar(outcome.combination, "masking"):
            continue
        layers += found
        spreads.append(max(found) - min(found))
        if all(low <= share <= high for share in found) and outcome.seed in baselines:
            rises.append(outcome.perplexity["float32"] / baselines[outcome.seed] - 1)
    if not layers:
        return Claim(text, "no experiment with masking recorded its layers", "not measured")
    within = sum(low <= share <= high for share in layers)
    cut = f"{percent(min(layers))} to {percent(max(layers))} of a layer's channels cut"
    words = [
        f"{cut}; {within} of {len(layers)} layers in {count(len(spreads), 'experiment')} lie within",
        "all layers of an experiment are cut alike"
        if max(spreads) < 1e-9
        else f"layers of one experiment differ by up to {100 * max(spreads):.1f} points",
    ]
    if rises:
        words.append(f"perplexity there: {change(min(rises))} to {change(max(rises))} against the baseline")
    return Claim(text, "; ".join(words), _verdict(within, len(layers)))


def _less_memory(outcomes: Sequence[Outcome], combination: str) -> Claim:
    text = f"less training memory: {combination}"
    comparison = compare_memory(outcomes, combination)
    if comparison is None:
        return Claim(text, "not measured beside a baseline of the same seed", "not measured")
    found = comparison.found
    ends = "" if found.change_interval is None else f" {interval(found.change_interval)}"
    said = f"{change(found.change)} at the peak{ends}, {count(found.n, 'seed')}"
    return Claim(text, said, _memory_verdict(found))


def _memory_verdict(found: Paired) -> str:
    if found.change_interval is None:
        return "not shown"
    low, high = found.change_interval
    return "holds" if high < 0 else "does not hold" if low > 0 or math.isclose(low, high) else "not shown"


def _verdict(reached: int, n: int) -> str:
    return "holds" if reached == n else "holds in part" if reached else "does not hold"
