"""How several seeds of several methods are summed up: means, paired changes, and what may be said of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from research.reports import words
from research.reports.significance import LEVEL, Paired, holm, paired

Series = Mapping[str, Sequence[float]]  # perplexities of each method, one for each seed
TABLE_HEADER = ("perplexity", "change", "95 % interval", "p (Holm)")


@dataclass(frozen=True)
class Line:
    """A method over all seeds.

    Attributes:
        name: of the method.
        perplexity: geometric mean over seeds.
        found: differences of log-perplexity from the reference's of the same seed; None for the reference itself.
        p: of the paired t-test, corrected by Holm over all tables; None where it was not tested.
    """

    name: str
    perplexity: float
    found: Paired | None
    p: float | None

    @property
    def is_significant(self) -> bool:
        return self.p is not None and self.p < LEVEL


def compared(tables: Mapping[str, Series], reference: str) -> dict[str, list[Line]]:
    """Every method of every table against a reference, paired by seed; p-values are corrected over all tables.

    Args:
        tables: series by table.
        reference: one of the methods of each table.
    """
    logs = {
        table: {name: [math.log(value) for value in values] for name, values in series.items()}
        for table, series in tables.items()
    }
    found = {
        (table, name): paired([a - b for a, b in zip(values, series[reference], strict=True)])
        for table, series in logs.items()
        for name, values in series.items()
        if name != reference
    }
    tested = {key: f.p_t for key, f in found.items() if f.p_t is not None}
    corrected = dict(zip(tested, holm(list(tested.values())), strict=True))
    return {
        table: [
            Line(name, mean(tables[table][name]), found.get((table, name)), corrected.get((table, name)))
            for name in series
        ]
        for table, series in tables.items()
    }


def mean(perplexities: Sequence[float]) -> float:
    """The geometric mean: the perplexity of the mean log-likelihood."""
    return math.exp(statistics.fmean(math.log(value) for value in perplexities))


def table_row(line: Line) -> tuple[str, str, str, str]:
    """The cells of `TABLE_HEADER`."""
    if line.found is None:
        return f"{line.perplexity:.2f}", "–", "–", "–"
    found = line.found
    changes = words.change(found.change), words.interval(found.change_interval)
    return f"{line.perplexity:.2f}", *changes, words.p_value(line.p)


def said(line: Line, name: str, reference: str) -> str:
    """A comparison as a clause, which claims no more than the test does."""
    assert line.found is not None
    change = words.change(line.found.change)
    difference = f"{change}, 95 % {words.interval(line.found.change_interval)}"
    if line.p is None:
        return f"{name} against {reference}: {change}, not tested"
    if not line.is_significant:
        return f"no significant difference between {name} and {reference} ({difference})"
    return f"{name} {'better' if line.found.mean < 0 else 'worse'} than {reference} ({difference})"
