"""The result of a comparison as tables: all figures, and ours against the best peer and the machine's limits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report import text_table

LESS_IS_BETTER = ("load", "first", "imports", "model", "peak")
_ORDER = ("prefill", "decode", "depth", *LESS_IS_BETTER)
_COMPARED = ("prefill", "decode", "depth", "first", "peak")


@dataclass(frozen=True)
class Table:
    """A table in any notation.

    Attributes:
        notes: lines below it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        return not self.rows or len(self.columns) == 1

    def text(self) -> str:
        return "\n".join([text_table(self.title, self.columns, self.rows), *(f"  {note}" for note in self.notes)])

    def markdown(self) -> str:
        head = f"| {' | '.join(self.columns)} |\n|---|{'---:|' * (len(self.columns) - 1)}"
        body = "\n".join(f"| {' | '.join(row)} |" for row in self.rows)
        notes = "".join(f"\n{note}" for note in self.notes)
        return f"### {self.title}\n\n{head}\n{body}\n{notes}".rstrip()


@dataclass(frozen=True)
class Listing:
    """Texts too long for a table."""

    title: str
    entries: tuple[tuple[str, str], ...]

    @property
    def is_empty(self) -> bool:
        return not self.entries

    def text(self) -> str:
        return "\n".join([self.title, *(f"  {name}: {text}" for name, text in self.entries)])

    def markdown(self) -> str:
        return "\n".join([f"### {self.title}\n", *(f"- {name}: {text}" for name, text in self.entries)])


@dataclass(frozen=True)
class Line:
    """One of our figures beside what it is compared with; None where there is nothing.

    Attributes:
        like: best peer of the same precision: its name and figure.
        best: best peer of all.
        limit: of the machine, for this precision.
    """

    quantity: str
    ours: str
    figure: float
    like: tuple[str, float] | None
    best: tuple[str, float] | None
    limit: float | None


def compare_tables(result: dict[str, Any]) -> list[Table | Listing]:
    """Everything to show of a result of `benchmarks.compare`."""
    measured = quantities(result)
    speeds = [quantity for quantity in measured if quantity.startswith(("prefill", "decode"))]
    depths = [quantity for quantity in measured if quantity.startswith("depth")]
    sizes = [quantity for quantity in measured if quantity.startswith(LESS_IS_BETTER)]
    model = f"{result['model']['name']}, {result['settings']['threads']} threads"
    found: list[Table | Listing] = [
        Table(f"Tokens per second, {model}", ("", *speeds), _figures(result, speeds)),
        Table(f"Tokens per second after so many tokens, {model}", ("", *depths), _figures(result, depths)),
        Table(
            "Loading and memory",
            ("", *sizes, "logits differ by"),
            _figures(result, sizes, result["disagreement"]),
            (
                "first token: from the start of loading, imports over, to the first logits. model: resident memory",
                "that came with them. peak: of the whole process, imports included, over all that was measured.",
                f"logits differ by: largest difference to {result['reference']} over its largest one, after one text.",
            ),
        ),
        Table(
            "Ours against the best peer and this machine's limit",
            ("", "ours", "like peer", "ratio", "best peer", "ratio", "limit", "ratio"),
            tuple(map(_line_row, lines(result))),
            (
                "ratio: ours / theirs. like peer: the best of the same precision.",
                "limit of decode: weights and states read once per step, or the products, whichever takes longer;",
                "limit of prefill: the products of projections and head (int4 as int8), all else being free.",
            ),
        ),
        _limits(result),
        Listing("Who ran", tuple(_versions(result))),
        Listing("Measured once, while warming up", tuple(_warm_up_only(result))),
        Listing("Not measured", tuple(_missing(result))),
    ]
    return [part for part in found if not part.is_empty]


def lines(result: dict[str, Any]) -> list[Line]:
    """Every figure of ours with its comparisons."""
    found = []
    peers = [c for c in result["contestants"] if not c["is_ours"]]
    for quantity in quantities(result):
        for contestant in result["contestants"]:
            figure = contestant["summary"].get(quantity)
            if not contestant["is_ours"] or figure is None or not quantity.startswith(_COMPARED):
                continue
            alike = [peer for peer in peers if peer["precision"] == contestant["precision"]]
            limit = contestant["limits"].get(quantity)
            like, best = _best(alike, quantity), _best(peers, quantity)
            found.append(Line(quantity, contestant["name"], figure, like, best, limit))
    return found


def quantities(result: dict[str, Any]) -> list[str]:
    """Names of everything that somebody has a figure for, in a fixed order."""
    names = dict.fromkeys(quantity for c in result["contestants"] for quantity in c["summary"])

    def position(quantity: str) -> tuple[int, float]:
        kind, _, size = quantity.partition(" ")
        return _ORDER.index(kind), float(size) if size.isdigit() else 0.0

    return sorted(names, key=position)


def number(value: float | None) -> str:
    """Three digits or more, and a dash for nothing."""
    if value is None:
        return "–"
    if 0 < value < 0.1:
        return f"{value:.3g}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _figures(
    result: dict[str, Any], names: Sequence[str], disagreement: dict[str, float] | None = None
) -> tuple[tuple[str, ...], ...]:
    rows = []
    for contestant in result["contestants"]:
        cells = [contestant["name"], *(number(contestant["summary"].get(name)) for name in names)]
        if disagreement is not None:
            error = disagreement.get(contestant["name"])
            cells.append("–" if error is None else f"{error:.1e}")
        rows.append(tuple(cells))
    return tuple(rows)


def _line_row(line: Line) -> tuple[str, ...]:
    def compared(peer: tuple[str, float] | None) -> tuple[str, str]:
        return ("–", "–") if peer is None else (peer[0], _ratio(line.figure, peer[1]))

    limit = ("–", "–") if line.limit is None else (number(line.limit), _ratio(line.figure, line.limit))
    name = f"{line.quantity}, {line.ours.removeprefix('ours ')}"
    return (name, number(line.figure), *compared(line.like), *compared(line.best), *limit)


def _limits(result: dict[str, Any]) -> Table:
    machine, limits = result["machine"], result["limits"]
    rows: list[tuple[str, ...]] = []
    if limits:
        rows.append(("read", f"{limits['read_bytes_per_s'] / 1e9:.1f} GB/s", limits["best_way"]["read"]))
        rows += [
            (f"products, {name}", f"{rate / 1e9:,.0f} GFLOP/s", limits["best_way"][name])
            for name, rate in limits["flops_per_s"].items()
        ]
    load = f"load {machine['load_average_1min']:g} before and {result['load_average_after']:g} after"
    note = f"{machine['cpu']}, {machine['cores_usable']} cores, {load}; {result['time']}"
    return Table("This machine", ("", "at most", "by"), tuple(rows), (note,))


def _versions(result: dict[str, Any]) -> Iterable[tuple[str, str]]:
    for contestant in result["contestants"]:
        yield contestant["name"], ", ".join(f"{package} {text}" for package, text in contestant["versions"].items())


def _warm_up_only(result: dict[str, Any]) -> Iterable[tuple[str, str]]:
    for contestant in result["contestants"]:
        if contestant.get("warm_up_only"):
            yield contestant["name"], ", ".join(contestant["warm_up_only"])


def _missing(result: dict[str, Any]) -> Iterable[tuple[str, str]]:
    yield from result["absent"].items()
    for contestant in result["contestants"]:
        whys: dict[str, list[str]] = {}
        for quantity, why in contestant["notes"].items():
            whys.setdefault(why, []).append(quantity)
        for why, names in whys.items():
            yield f"{contestant['name']}, {', '.join(names)}", why


def _best(peers: Sequence[dict[str, Any]], quantity: str) -> tuple[str, float] | None:
    figures = [(peer["name"], peer["summary"][quantity]) for peer in peers if quantity in peer["summary"]]
    if not figures:
        return None
    choose = min if quantity.startswith(LESS_IS_BETTER) else max
    return choose(figures, key=lambda pair: pair[1])


def _ratio(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.2f}" if theirs else "–"
