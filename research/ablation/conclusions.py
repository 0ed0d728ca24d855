"""What a study says, in sentences computed from its results."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from research.ablation.claims import Claim, check_claims
from research.ablation.comparisons import Comparison, Kind, compare
from research.ablation.efficiency import (
    MAIN_COST,
    Configuration,
    best,
    cheapest,
    chosen_on,
    configurations,
    decisive,
    within,
)
from research.ablation.outcome import COSTS, MEASURES, Outcome, has_pillar, read_outcomes
from research.reports.significance import LEVEL
from research.reports.words import change, count, interval, listed, number, p_value, percent

TOLERATED = 0.05  # rise of perplexity above the baseline's within which the best configuration is looked for
KINDS: dict[Kind, tuple[str, str]] = {
    "pillar": ("Each pillar over all combinations of the others", "main effect of a pillar"),
    "baseline": ("Against the baseline", "comparison of a combination with the baseline"),
    "all": ("All three pillars against fewer", "comparison of all three pillars with fewer"),
    "interaction": ("Pillars together against their sum", "interaction of pillars"),
    "setting": ("Settings of the grid", "effect of a setting"),
}


@dataclass(frozen=True)
class Conclusions:
    """A study, read.

    Attributes:
        outcomes: its finished experiments.
        failed: (name, reason) of those that cannot be compared.
        comparisons: with corrected p-values.
        found: configurations, over seeds.
        best: the configuration with the highest score within `TOLERATED` of the baseline's perplexity; of all where no
            baseline finished; None where nothing is scored.
        claims: the classic ones, checked.
        sentences: what all this says, the most important first.
    """

    outcomes: list[Outcome]
    failed: list[tuple[str, str]]
    comparisons: list[Comparison]
    found: list[Configuration]
    best: Configuration | None
    claims: list[Claim]
    sentences: list[str]

    @property
    def seeds(self) -> list[int]:
        return sorted({outcome.seed for outcome in self.outcomes})

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        tested = [c for c in self.comparisons if c.p_holm is not None]
        return {
            "sentences": self.sentences,
            "significance_level": LEVEL,
            "correction": "Holm",
            "tests": len(tested),
            "comparisons": [comparison.describe() for comparison in self.comparisons],
            "best": None if self.best is None else _described(self.best),
            "best_chosen_on": chosen_on(self.found),
            "configurations": [_described(configuration) for configuration in self.found],
            "claims": [vars(claim) for claim in self.claims],
            "not_compared": [{"experiment": name, "reason": reason} for name, reason in self.failed],
        }


def conclude(results: Sequence[dict[str, Any]]) -> Conclusions:
    """Reads, compares and sums up the results of a study."""
    outcomes, failed = read_outcomes(results)
    comparisons, found = compare(outcomes), configurations(outcomes)
    claims = check_claims(outcomes)
    first, *effects = _significance(outcomes, comparisons)
    sentences = [first, *_best_points(found), *effects, *_on_claims(claims), *_kept_orders(outcomes)]
    if not outcomes:
        sentences = ["No experiment finished, so there is nothing to conclude."]
    top = best(found, within(found, TOLERATED) or found)
    return Conclusions(outcomes, failed, comparisons, found, top, claims, sentences)


def _significance(outcomes: Sequence[Outcome], comparisons: Sequence[Comparison]) -> list[str]:
    tested = [comparison for comparison in comparisons if comparison.p_holm is not None]
    seeds = count(len({outcome.seed for outcome in outcomes}), "seed")
    if not tested:
        reason = f"a test needs pairs of experiments in several seeds that differ, and there is {seeds}"
        return [f"Nothing is tested: {reason}. The differences below may be chance."]
    significant = [comparison for comparison in tested if comparison.is_significant]
    if significant:
        first = f"{len(significant)} of {count(len(tested), 'test')} are significant"
    else:
        first = f"Nothing is significant: none of {count(len(tested), 'test')} is"
    first += f" at {100 * LEVEL:.0f} % after Holm's correction for their number ({seeds})."
    sentences = [first]
    for kind in KINDS:
        for measure in MEASURES:
            these = [c for c in comparisons if c.kind == kind and c.measure == measure]
            if any(comparison.p_holm is not None for comparison in these):
                sentences.append(_family(kind, measure, these))
    return sentences


def _family(kind: Kind, measure: str, comparisons: Sequence[Comparison]) -> str:
    """One sentence on the comparisons of a kind."""
    title, noun = KINDS[kind]
    tested = [comparison for comparison in comparisons if comparison.p_holm is not None]
    identical = [comparison.subject for comparison in comparisons if comparison.is_identical]
    same = f"; no difference at all: {', '.join(identical)}" if identical else ""
    significant = [comparison for comparison in tested if comparison.is_significant]
    if not significant:
        smallest = min(tested, key=lambda c: c.p_holm or 0.0)
        ends = [c.found.change_interval for c in tested if c.found.change_interval is not None]
        halves = [(high - low) / 2 for low, high in ends]
        half = percent(statistics.median(halves))
        return (
            f"{title}, {measure} perplexity: no significant {noun}; smallest corrected p {p_value(smallest.p_holm)} "
            f"({smallest.subject}, {change(smallest.found.change)}){same}. Half an interval is {half} at the median: "
            "smaller effects would hardly be seen."
        )
    effects = [
        f"{c.subject} {change(c.found.change)} {interval(c.found.change_interval)}, p {p_value(c.p_holm)}"
        for c in significant
    ]
    others = [comparison.subject for comparison in tested if not comparison.is_significant]
    rest = f"; not significant: {', '.join(others)}" if others else ""
    return f"{title}, {measure} perplexity changes significantly: {'; '.join(effects)}{rest}{same}."


def _best_points(found: Sequence[Configuration]) -> list[str]:
    """The best one within a limit of quality first: the score alone gives little for perplexity."""
    baseline = next((c for c in found if c.combination == "baseline"), None)
    text, fitting = chosen_on(found), within(found, TOLERATED)
    limit = f"within {100 * TOLERATED:.0f} % of the baseline's perplexity on the {text}"
    sentences = []
    top, any_top = best(found, fitting), best(found, found)
    if top is not None:
        score = f"score {number(top.score)} (baseline 1)"
        sentences.append(
            f"The best Pareto point by the score, {limit}, is {top.name}: {_against(top, baseline)}; {score}"
            f"{_place(top, found)}."
        )
    if any_top is not None and any_top is not top:
        sentences.append(
            f"The best Pareto point by the score at any perplexity is {any_top.name}: {_against(any_top, baseline)}; "
            f"score {number(any_top.score)}{_place(any_top, found)}."
        )
    lowest = min(found, key=lambda c: decisive(c, found), default=None)
    if lowest is not None and len(found) > 1:
        sentences.append(f"Lowest perplexity on the {text}: {lowest.name}, {_against(lowest, baseline)}.")
    cheap = cheapest(found, fitting)
    if cheap is not None and baseline is not None:
        if cheap.costs[MAIN_COST] < baseline.costs.get(MAIN_COST, 0.0):
            sentences.append(f"Fewest FLOPs {limit}: {cheap.name}, {_against(cheap, baseline)}.")
        else:
            sentences.append(f"No configuration needs fewer FLOPs than the baseline {limit}.")
    return sentences


def _place(top: Configuration, found: Sequence[Configuration]) -> str:
    """Whether the text that is reported on agrees."""
    on_front = [c for c in found if MAIN_COST in c.fronts]
    is_or_not = "is" if top in on_front else "is not"
    return (
        f"; on the test text it {is_or_not} one of the {len(on_front)} of {count(len(found), 'configuration')} on the "
        "front of perplexity, FLOPs and trainable parameters"
    )


def _kept_orders(outcomes: Sequence[Outcome]) -> list[str]:
    """Which combinations were to learn an order of channels and learned none."""
    learned: dict[str, bool] = {}
    for outcome in outcomes:
        found = (outcome.result.get("layers") or {}).get("scan_correlation")
        if found and has_pillar(outcome.combination, "scan"):
            changed = found["before"] != found["after"]
            learned[outcome.combination] = changed or learned.get(outcome.combination, False)
    kept = [name for name, was_learned in learned.items() if not was_learned]
    return [f"No order was learned in {listed(kept)}: channels stayed as they started."] if kept else []


def _on_claims(claims: Sequence[Claim]) -> list[str]:
    """Which claims hold, in short."""
    by_verdict: dict[str, list[str]] = defaultdict(list)
    for claim in claims:
        by_verdict[claim.verdict].append(claim.text)
    return [f"Classic claims, {verdict}: {'; '.join(texts)}." for verdict, texts in by_verdict.items()]


def _against(configuration: Configuration, baseline: Configuration | None) -> str:
    """Perplexity and costs, with their changes against the baseline."""
    perplexity = configuration.perplexity[MEASURES[0]]
    words = [f"perplexity {perplexity:.2f}"]
    if baseline is None or configuration is baseline:
        return words[0]
    words[0] += f" ({change(perplexity / baseline.perplexity[MEASURES[0]] - 1)} against the baseline)"
    is_timed = configuration.costs.get(MAIN_COST) != baseline.costs.get(MAIN_COST)  # else the clock's chance alone
    for key in (MAIN_COST, "weight_bytes", *(["decode_ms"] if is_timed else [])):
        if key in configuration.costs and baseline.costs.get(key):
            label = COSTS[key].label.split(",")[0]
            words.append(f"{label} {change(configuration.costs[key] / baseline.costs[key] - 1)}")
    if configuration.trainable is not None and baseline.trainable:
        words.append(f"trainable parameters {change(configuration.trainable / baseline.trainable - 1)}")
    return listed(words)


def _described(configuration: Configuration) -> dict[str, Any]:
    return {"name": configuration.name, **vars(configuration)}
