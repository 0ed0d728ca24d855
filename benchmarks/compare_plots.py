"""Plots of a comparison: who reads and generates how fast, at which batch and depth, and what it costs to load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_OUR_COLOURS = ("#b3123b", "#e0526e", "#f2a0ae", "#c46210", "#e39a4a", "#f3cf9b", "#7d0a27")
_PEER_COLOURS = ("#1f4e79", "#3f7fb5", "#8fb8dc", "#6b6b6b", "#a0892c", "#4f7942", "#7a5195", "#999999")
_MARKERS = "osD^vPX*"


def plot_compare(result: dict[str, Any], path: Path) -> None:
    """Draws a result of `benchmarks.compare` as one PNG.

    Args:
        result: with at least one contestant.
        path: of the file.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 3, figsize=(16, 9), layout="constrained")
    styles = styles_of(result["contestants"])
    _rates(grid[0][0], result, styles, "prefill", "Reading a text", "tokens of the text")
    _rates(grid[0][1], result, styles, "decode", "Generating, by batch", "sequences at once")
    _rates(grid[0][2], result, styles, "depth", "Generating, by depth", "tokens read before", is_linear=True)
    _bars(grid[1][0], result, styles, "first token s", "Load and first token", "seconds")
    _bars(grid[1][1], result, styles, "peak MB", "Peak memory of the process", "MB")
    _shares(grid[1][2], result, styles)
    handles = [_handle(pyplot, name, style) for name, style in styles.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False)
    machine, settings = result["machine"], result["settings"]
    figure.suptitle(
        f"{result['model']['name']}, {settings['threads']} threads, {machine['cpu']}: medians of {settings['repeats']}",
        fontsize=12,
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def styles_of(contestants: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Name -> how its lines are drawn: ours in reds and thick, peers in other colours."""
    ours = [c["name"] for c in contestants if c["is_ours"]]
    peers = [c["name"] for c in contestants if not c["is_ours"]]
    styles = {}
    for names, colours, width in ((ours, _OUR_COLOURS, 2.4), (peers, _PEER_COLOURS, 1.4)):
        for index, name in enumerate(names):
            colour, marker = colours[index % len(colours)], _MARKERS[index % len(_MARKERS)]
            styles[name] = {"color": colour, "linewidth": width, "marker": marker, "markersize": 5}
    return styles


def _handle(pyplot: Any, name: str, style: dict[str, Any]) -> Any:
    return pyplot.Line2D([], [], label=name, **style)


def _rates(
    axes: Any,
    result: dict[str, Any],
    styles: dict[str, Any],
    kind: str,
    title: str,
    label: str,
    *,
    is_linear: bool = False,
) -> None:
    """Lines over sizes; both axes logarithmic, or the sizes evenly spaced where one of them may be 0."""
    sizes = sorted({int(q.split()[1]) for c in result["contestants"] for q in c["summary"] if q.startswith(kind + " ")})
    places = {size: index if is_linear else size for index, size in enumerate(sizes)}
    for contestant in result["contestants"]:
        points = [(places[s], contestant["summary"].get(f"{kind} {s}")) for s in sizes]
        known = [(x, y) for x, y in points if y is not None]
        if known:
            axes.plot(*zip(*known, strict=True), **styles[contestant["name"]])
    axes.set(title=title, xlabel=label, ylabel="tokens per second")
    if not sizes:
        _say_nothing(axes)
    else:
        if not is_linear:
            axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks([places[size] for size in sizes], [f"{size:,}" for size in sizes])
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.minorticks_off()
    axes.grid(visible=True, which="major", alpha=0.3)


def _say_nothing(axes: Any) -> None:
    axes.set_axis_off()
    axes.annotate("not measured", (0.5, 0.5), xycoords="axes fraction", ha="center", color="grey")


def _bars(axes: Any, result: dict[str, Any], styles: dict[str, Any], quantity: str, title: str, unit: str) -> None:
    known = [(c["name"], c["summary"][quantity]) for c in result["contestants"] if quantity in c["summary"]]
    for row, (name, value) in enumerate(reversed(known)):
        axes.barh(row, value, color=styles[name]["color"])
        axes.annotate(f" {value:,.2f}" if value < 10 else f" {value:,.0f}", (value, row), va="center", fontsize=8)
    axes.set_yticks(range(len(known)), [name for name, _ in reversed(known)], fontsize=8)
    axes.margins(x=0.15)
    axes.set(title=title, xlabel=f"{unit} (less is better)")


def _shares(axes: Any, result: dict[str, Any], styles: dict[str, Any]) -> None:
    """How much of the machine's limit each of ours reaches."""
    ours = [c for c in result["contestants"] if c["is_ours"]]
    names = list(dict.fromkeys(q for c in ours for q in c["limits"] if q in c["summary"]))
    height = 0.8 / max(1, len(ours))
    for index, contestant in enumerate(ours):
        for row, name in enumerate(names):
            if name in contestant["limits"] and name in contestant["summary"]:
                share = contestant["summary"][name] / contestant["limits"][name]
                place = len(names) - 1 - row - index * height
                axes.barh(place, share, height * 0.9, color=styles[contestant["name"]]["color"])
    if not names:
        _say_nothing(axes)
    axes.axvline(1, color="black", linewidth=0.8)
    middle = 0.4 - height / 2
    axes.set_yticks([len(names) - 1 - row - middle for row in range(len(names))], names, fontsize=8)
    axes.set(title="Ours, as a share of the machine's limit", xlabel="1 is the limit")
