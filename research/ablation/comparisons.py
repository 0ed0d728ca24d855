"""Which experiments are compared with which: pairs within a seed, and contrasts of the 2 x 2 x 2 design."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any, Literal

from research.ablation.outcome import COMBINATIONS, GRID_KEYS, MEASURES, PILLARS, Outcome, combination_with
from research.reports.significance import LEVEL, Paired, holm, paired

Kind = Literal["baseline", "all", "pillar", "interaction", "setting"]


@dataclass(frozen=True)
class Comparison:
    """Differences of log-perplexity, one per seed, and what they say.

    Points of the grid in one seed share their base model and data, so they are no independent evidence: each seed
    gives one difference, the mean over its pairs.

    Attributes:
        kind: `baseline` (a combination against it), `all` (all pillars against a combination), `pillar` (experiments
            with it against those without), `interaction` (of pillars), or `setting` (largest against smallest value).
        name: what is compared.
        measure: precision of the perplexity.
        differences: by seed, in nats per token; negative is better.
        pairs: how many they are means of, in all.
        found: what the differences say.
        p_holm: of the t-test, corrected for all tests of the report; None where it was not tested.
    """

    kind: Kind
    name: str
    measure: str
    differences: Mapping[int, float]
    pairs: int
    found: Paired
    p_holm: float | None = None

    @property
    def subject(self) -> str:
        """What is compared, where the kind is known."""
        if self.kind in ("baseline", "all"):
            return self.name.removesuffix(" against baseline").removeprefix("all against ")
        return self.name

    @property
    def is_significant(self) -> bool:
        return self.p_holm is not None and self.p_holm < LEVEL

    @property
    def is_identical(self) -> bool:
        """Whether no seed shows any difference."""
        return self.found.interval == (0.0, 0.0)

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "kind": self.kind,
            "name": self.name,
            "measure": self.measure,
            "change": self.found.change,
            "change_interval": self.found.change_interval,
            "pairs": self.pairs,
            "log_differences_by_seed": {str(seed): value for seed, value in self.differences.items()},
            "statistics": {**vars(self.found)},
            "p_holm": self.p_holm,
            "is_significant": self.is_significant,
        }


def compare(outcomes: Sequence[Outcome]) -> list[Comparison]:
    """All comparisons that the outcomes allow, their p-values corrected together."""
    candidates: list[Comparison | None] = []
    for measure in MEASURES:
        values = [(outcome, outcome.log_perplexity(measure)) for outcome in outcomes]
        study = _Study([(outcome, value) for outcome, value in values if value is not None])
        if not study.by_seed:
            continue
        others = [name for name in COMBINATIONS if name != "baseline"]
        candidates += [study.comparison("baseline", name, "baseline", measure) for name in others]
        candidates += [study.comparison("all", "all", name, measure) for name in others if name != "all"]
        for size in range(1, len(PILLARS) + 1):
            kind: Kind = "pillar" if size == 1 else "interaction"
            for pillars in combinations(PILLARS, size):
                candidates.append(_tested(kind, " × ".join(pillars), measure, study.contrast(pillars)))
        if measure == MEASURES[0]:
            candidates += [_setting(outcomes, key) for key in GRID_KEYS]
    found = [comparison for comparison in candidates if comparison is not None]
    p_values = {i: c.found.p_t for i, c in enumerate(found) if c.found.p_t is not None}
    corrected = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    return [replace(comparison, p_holm=corrected.get(i)) for i, comparison in enumerate(found)]


class _Study:
    """Outcomes with their log-perplexities in one precision, by seed and combination."""

    def __init__(self, values: Iterable[tuple[Outcome, float]]) -> None:
        self.by_seed: dict[int, dict[str, list[tuple[Outcome, float]]]] = defaultdict(lambda: defaultdict(list))
        for outcome, value in values:
            self.by_seed[outcome.seed][outcome.combination].append((outcome, value))

    def comparison(self, kind: Kind, first: str, second: str, measure: str) -> Comparison | None:
        """Pairs two combinations within each seed, where their points agree on the keys that both have."""
        pairs = {
            seed: [
                a - b
                for (one, a), (other, b) in product(found[first], found[second])
                if all(other.point.get(key, value) == value for key, value in one.point.items())
            ]
            for seed, found in self.by_seed.items()
        }
        return _tested(kind, f"{first} against {second}", measure, pairs)

    def contrast(self, pillars: Sequence[str]) -> dict[int, list[float]]:
        """By seed and point at which all eight combinations are there, the effect of pillars.

        Of one pillar, the mean with it minus the mean without it over the four combinations of the others. Of two,
        the effect of one with the other minus without it; of three, the difference of two such differences.
        """
        divisor = 2 ** (len(PILLARS) - len(pillars))
        found = {}
        for seed, by_combination in self.by_seed.items():
            keys = {name: tuple(values[0][0].point) for name, values in by_combination.items() if values}
            cells = {
                (name, tuple(outcome.point.values())): value
                for name, values in by_combination.items()
                for outcome, value in values
            }
            effects = []
            for outcome, _ in by_combination["all"]:
                effect = 0.0
                for present in product((False, True), repeat=len(PILLARS)):
                    named = {pillar for pillar, is_present in zip(PILLARS, present, strict=True) if is_present}
                    name = combination_with(tuple(named))
                    cell = cells.get((name, tuple(outcome.point[key] for key in keys.get(name, ()))))
                    effect += math.nan if cell is None else (-1) ** len(set(pillars) - named) * cell
                effects.append(effect / divisor)
            found[seed] = [effect for effect in effects if not math.isnan(effect)]
        return found


def _tested(kind: Kind, name: str, measure: str, pairs: Mapping[int, Sequence[float]]) -> Comparison | None:
    """None where no pair exists."""
    differences = {seed: statistics.fmean(values) for seed, values in sorted(pairs.items()) if values}
    if not differences:
        return None
    found = paired(list(differences.values()))
    return Comparison(kind, name, measure, differences, sum(map(len, pairs.values())), found)


def _setting(outcomes: Sequence[Outcome], key: str) -> Comparison | None:
    """The largest value of a setting against the smallest, all else being equal."""
    found: dict[int, list[float]] = defaultdict(list)
    levels: list[float] = []
    for seed, block in _blocks(outcomes, key):
        levels = sorted(block)
        found[seed].append(block[levels[-1]] - block[levels[0]])
    name = f"{key} {levels[-1]:g} against {levels[0]:g}" if levels else key
    return _tested("setting", name, MEASURES[0], found)


def compare_memory(outcomes: Sequence[Outcome], combination: str) -> Comparison | None:
    """The logarithm of the peak of training memory against the baseline's, paired as perplexities are; None without."""
    study = _Study([(o, math.log(o.memory_bytes)) for o in outcomes if o.memory_bytes])
    return study.comparison("baseline", combination, "baseline", "training memory")


def setting_effects(outcomes: Sequence[Outcome], key: str) -> dict[float, Paired]:
    """For each value of a setting, how far it moves the log-perplexity from the mean over its values, by seed."""
    found: dict[float, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for seed, block in _blocks(outcomes, key):
        middle = statistics.fmean(block.values())
        for level, value in block.items():
            found[level][seed].append(value - middle)
    return {
        level: paired([statistics.fmean(values) for values in by_seed.values()])
        for level, by_seed in sorted(found.items())
    }


def _blocks(outcomes: Sequence[Outcome], key: str) -> list[tuple[int, dict[float, float]]]:
    """(seed, log-perplexity by value of a setting) where all else is equal, and each value of the study is there."""
    blocks: dict[Any, dict[float, float]] = defaultdict(dict)
    for outcome in outcomes:
        value = outcome.log_perplexity(MEASURES[0])
        if key in outcome.point and value is not None:
            others = tuple((name, setting) for name, setting in outcome.point.items() if name != key)
            blocks[outcome.seed, outcome.combination, others][outcome.point[key]] = value
    levels = {level for block in blocks.values() for level in block}
    if len(levels) < 2:
        return []
    return [(seed, block) for (seed, _, _), block in sorted(blocks.items()) if set(block) == levels]
