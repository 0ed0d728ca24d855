"""How several seeds of several methods are summed up: means, paired changes, and what may be said of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from research.ablation import words
from research.ablation.significance import LEVEL, Paired, holm, paired

Series = Mapping[str, Sequence[float]]  # perplexities of each method, one for each seed
TABLE_HEADER = ("perplexity", "change", "95 % interval", "p (Holm)")


@dataclass(frozen=True)
class Line:
    """A method over all seeds.

    Attributes:
        name: of the method.
        perplexity: geometric mean over seeds.
        found: differences of log-perplexity from the reference's of the same seed; None for the reference itself.
        p: of the paired t-test, corrected by Holm for all lines of the table; None where it was not tested.
    """

    name: str
    perplexity: float
    found: Paired | None
    p: float | None

    @property
    def is_significant(self) -> bool:
        return self.p is not None and self.p < LEVEL

    @property
    def change(self) -> float | None:
        """Of the perplexity against the reference's, as a share of it."""
        return None if self.found is None else math.expm1(self.found.mean)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % of that change."""
        if self.found is None or self.found.interval is None:
            return None
        low, high = self.found.interval
        return math.expm1(low), math.expm1(high)


def compared(series: Series, reference: str, tests: int | None = None) -> list[Line]:
    """Each method against a reference, paired by seed.

    Args:
        series: perplexities by method.
        reference: one of the methods.
        tests: how many the p-values are corrected for, where more tables belong together; None for these alone.
    """
    logs = {name: [math.log(value) for value in values] for name, values in series.items()}
    found = {
        name: paired([a - b for a, b in zip(values, logs[reference], strict=True)])
        for name, values in logs.items()
        if name != reference
    }
    tested = {name: f.p_t for name, f in found.items() if f.p_t is not None}
    # those that belong to other tables count as the least significant ones, which Holm's correction does not depend on
    padding = [1.0] * max(0, (tests or 0) - len(tested))
    corrected = dict(zip(tested, holm([*tested.values(), *padding]), strict=False))
    return [
        Line(name, math.exp(statistics.fmean(values)), found.get(name), corrected.get(name))
        for name, values in logs.items()
    ]


def table_row(line: Line) -> tuple[str, str, str, str]:
    """The cells of `TABLE_HEADER`."""
    p = "–" if line.p is None else words.p_value(line.p)
    return f"{line.perplexity:.2f}", words.change(line.change), words.interval(line.interval), p


def said(line: Line, name: str, reference: str) -> str:
    """A comparison as a clause, which claims no more than the test does."""
    assert line.change is not None
    difference = f"{words.change(line.change)}, 95 % {words.interval(line.interval)}"
    if not line.is_significant:
        return f"no significant difference between {name} and {reference} ({difference})"
    return f"{name} {'better' if line.change < 0 else 'worse'} than {reference} ({difference})"
