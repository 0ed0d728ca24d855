"""What a configuration is worth: quality, cost and trainable parameters, Pareto fronts, and one number."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from research.ablation.outcome import COSTS, MEASURES, Outcome, name_of
from research.reports.significance import ROUNDING

MAIN_COST = "flops_per_token"  # exact, and what the score is made of
SCORE = (
    "score = (1 / perplexity) / (FLOPs per token × trainable parameters): the geometric mean of the probabilities of "
    "the test text's tokens, over decode work and over the most parameters that any phase trained. It is divided by "
    "the baseline's, so it has no unit and the baseline has 1. In it a tenth of the trainable parameters makes up for "
    "a tenfold perplexity: read it beside the front."
)


@dataclass(frozen=True)
class Configuration:
    """A combination at one point of the grid, over its seeds.

    Attributes:
        combination, point: as of its experiments.
        seeds: that finished.
        perplexity: by precision, geometric mean over seeds.
        validation: likewise on the validation text; None where a seed has none.
        spread: smallest and largest float32 perplexity of a seed.
        costs: means over seeds, by key of `COSTS`.
        trainable: parameters, the most of any phase.
        score: as `SCORE` says; None where a part of it was not measured.
        fronts: the costs for which no other configuration is as good in perplexity, this cost and trainable
            parameters, and better in one of them.
    """

    combination: str
    point: Mapping[str, float]
    seeds: tuple[int, ...]
    perplexity: Mapping[str, float]
    validation: float | None
    spread: tuple[float, float]
    costs: Mapping[str, float]
    trainable: float | None
    score: float | None
    fronts: tuple[str, ...]

    @property
    def name(self) -> str:
        return name_of(self.combination, self.point)


def configurations(outcomes: Sequence[Outcome]) -> list[Configuration]:
    """Averages outcomes over seeds, scores them, and finds the fronts."""
    groups: dict[tuple[str, tuple[tuple[str, float], ...]], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        groups[outcome.combination, tuple(outcome.point.items())].append(outcome)
    means = [_mean(group) for group in groups.values()]
    scores = [_score(mean) for mean in means]
    unit = next((s for m, s in zip(means, scores, strict=True) if m.combination == "baseline" and s), 1.0)
    on_front: list[list[str]] = [[] for _ in means]
    for key in COSTS:
        for index in front(means, (key, "trainable")):
            on_front[index].append(key)
    return [
        Configuration(**{**vars(mean), "score": None if score is None else score / unit, "fronts": tuple(fronts)})
        for mean, score, fronts in zip(means, scores, on_front, strict=True)
    ]


def front(found: Sequence[Configuration], objectives: Sequence[str], measure: str = MEASURES[0]) -> list[int]:
    """Which configurations no other one dominates in perplexity and further objectives, all to be small.

    Args:
        found: configurations; those for which an objective was not measured are on no front.
        objectives: keys of `COSTS`, or `trainable`.
        measure: precision of the perplexity. Perplexities that only rounding tells apart are equal.

    Returns:
        Their places, from the lowest perplexity to the highest.
    """
    rows, places = [], []
    for place, configuration in enumerate(found):
        perplexity = configuration.perplexity.get(measure)
        values = [
            configuration.trainable if name == "trainable" else configuration.costs.get(name) for name in objectives
        ]
        if perplexity is not None and None not in values:
            rows.append([round(math.log(perplexity) / ROUNDING), *values])
            places.append(place)
    kept = [places[row] for row in non_dominated(rows)]
    return sorted(kept, key=lambda place: found[place].perplexity[measure])


def non_dominated(points: Sequence[Sequence[float | None]]) -> list[int]:
    """Indices of points (all coordinates to be small) that no other point is at least as good as and once better.

    Equal points do not dominate each other.
    """
    values = np.array(points, dtype=float)  # (points, objectives)
    return [
        index
        for index, point in enumerate(values)
        if not ((values <= point).all(axis=1) & (values < point).any(axis=1)).any()
    ]


def chosen_on(found: Sequence[Configuration]) -> str:
    """The text that decides which configuration is the best one: never the text that is reported on, if avoidable."""
    return "validation text" if all(c.validation is not None for c in found) else "test text"


def best(found: Sequence[Configuration], among: Sequence[Configuration]) -> Configuration | None:
    """The configuration with the highest score on the text that decides; None where none has a score.

    No other one is better in perplexity on that text, FLOPs and trainable parameters together.
    """
    candidates = [c for c in among if c.score is not None]
    return max(candidates, key=lambda c: _value(c) / decisive(c, found), default=None)


def within(found: Sequence[Configuration], share: float) -> list[Configuration]:
    """Those whose perplexity, on the text that decides, is at most a share above the baseline's.

    The best among them is on the front of all on that text: what beats it in everything is within the limit, too.
    """
    baseline = next((c for c in found if c.combination == "baseline"), None)
    if baseline is None:
        return []
    limit = decisive(baseline, found) * (1 + share)
    return [c for c in found if decisive(c, found) <= limit]


def cheapest(found: Sequence[Configuration], among: Sequence[Configuration]) -> Configuration | None:
    """The one of fewest FLOPs among some of those found."""
    timed = [c for c in among if MAIN_COST in c.costs]
    return min(timed, key=lambda c: (c.costs[MAIN_COST], decisive(c, found)), default=None)


def decisive(configuration: Configuration, found: Sequence[Configuration]) -> float:
    """Perplexity on the text that decides between the configurations found."""
    if chosen_on(found) == "test text":
        return configuration.perplexity[MEASURES[0]]
    assert configuration.validation is not None
    return configuration.validation


def _value(mean: Configuration) -> float:
    """The score without perplexity."""
    return (mean.score or 0.0) * mean.perplexity[MEASURES[0]]


def _score(mean: Configuration) -> float | None:
    flops = mean.costs.get(MAIN_COST)
    if not flops or not mean.trainable:
        return None
    return 1 / mean.perplexity[MEASURES[0]] / (flops * mean.trainable)


def _mean(group: Sequence[Outcome]) -> Configuration:
    first = group[0]
    float32 = [outcome.perplexity[MEASURES[0]] for outcome in group]
    perplexity = {
        measure: statistics.geometric_mean([outcome.perplexity[measure] for outcome in group])
        for measure in MEASURES
        if all(measure in outcome.perplexity for outcome in group)
    }
    costs = {
        key: statistics.fmean(outcome.costs[key] for outcome in group)
        for key in COSTS
        if all(key in outcome.costs for outcome in group)
    }
    validations = [outcome.validation for outcome in group if outcome.validation is not None]
    trainable = [outcome.trainable for outcome in group if outcome.trainable is not None]
    return Configuration(
        combination=first.combination,
        point=first.point,
        seeds=tuple(outcome.seed for outcome in group),
        perplexity=perplexity,
        validation=statistics.geometric_mean(validations) if len(validations) == len(group) else None,
        spread=(min(float32), max(float32)),
        costs=costs,
        trainable=statistics.fmean(trainable) if len(trainable) == len(group) else None,
        score=None,
        fronts=(),
    )
