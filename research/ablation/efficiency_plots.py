"""Plots of quality against cost."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from research.ablation.conclusions import Conclusions
from research.ablation.efficiency import Configuration, front
from research.ablation.outcome import COMBINATIONS, COSTS, GRID_KEYS, MEASURES, TRAINABLE, Quantity
from research.ablation.plot_parts import MARKS, heat_map, title
from research.reports.words import listed

_PANELS = {
    **{key: COSTS[key] for key in ("weight_bytes", "flops_per_token", "decode_ms")},
    "trainable": TRAINABLE,
}  # bytes of state follow the channels as FLOPs do; the report's table has them
_MOST_LEVELS = 8  # more come from a free search
_SETTINGS = ("rank", "sparsity")


def draw_fronts(figure: Any, conclusions: Conclusions) -> str:
    """Perplexity against each cost, and the front of those two."""
    found = conclusions.found
    panels = {key: quantity for key, quantity in _PANELS.items() if any(_cost(c, key) is not None for c in found)}
    if not panels:
        return "no cost was measured"
    figure.set_size_inches(13, 5.2 * math.ceil(len(panels) / 2) + 1)
    all_axes = list(figure.subplots(math.ceil(len(panels) / 2), 2, squeeze=False).flat)
    for axes in all_axes[len(panels) :]:
        axes.set_axis_off()
    for axes, (key, quantity) in zip(all_axes, panels.items(), strict=False):
        _front_panel(axes, found, key, quantity)
        top = None if conclusions.best is None else _cost(conclusions.best, key)
        if conclusions.best is not None and top is not None:
            ring = {"markersize": 22, "markerfacecolor": "none", "color": "black", "markeredgewidth": 1.8}
            axes.plot(top / quantity.divisor, conclusions.best.perplexity[MEASURES[0]], "o", zorder=4, **ring)
    for combination in dict.fromkeys(c.combination for c in found):
        colour, marker = MARKS[combination]
        edge = {"markeredgecolor": "black", "markeredgewidth": 0.5}
        all_axes[0].plot([], [], marker, color=colour, markersize=11, label=combination, **edge)
    figure.legend(loc="outside lower center", ncols=4)
    best = "" if conclusions.best is None else f"; in the ring, the best: {conclusions.best.name}"
    title(figure, f"{len(found)} configurations, means over seeds{best}")
    return ""


def _cost(configuration: Configuration, key: str) -> float | None:
    return configuration.trainable if key == "trainable" else configuration.costs.get(key)


def _front_panel(axes: Any, found: Sequence[Configuration], key: str, quantity: Quantity) -> None:
    points = [(c, cost / quantity.divisor) for c in found if (cost := _cost(c, key)) is not None]
    for combination in dict.fromkeys(c.combination for c, _ in points):
        own = [(cost, c.perplexity[MEASURES[0]]) for c, cost in points if c.combination == combination]
        colour, marker = MARKS[combination]
        size = 16 if combination == "baseline" else 9
        edge = {"markeredgecolor": "black", "markeredgewidth": 0.5, "alpha": 0.8}
        axes.plot(*zip(*own, strict=True), marker, color=colour, markersize=size, zorder=3, **edge)
    on_front = {found[place].name for place in front(found, (key,))}
    edges = sorted((cost, c.perplexity[MEASURES[0]]) for c, cost in points if c.name in on_front)
    axes.step(*zip(*edges, strict=True), where="post", color="#444444", linewidth=1.5, zorder=2)
    costs, perplexities = [cost for _, cost in points], [c.perplexity[MEASURES[0]] for c, _ in points]
    if min(costs) > 0 and max(costs) / min(costs) > 20:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,g}")
    else:
        axes.locator_params(axis="x", nbins=6)
    if max(perplexities) / min(perplexities) > 3:
        axes.set_yscale("log")
    axes.set(xlabel=quantity.label, ylabel="perplexity of the test text")
    axes.set_title(f"{len(edges)} of {len(points)} on this front", loc="left")
    axes.grid(visible=True, alpha=0.25)


def draw_surface(figure: Any, conclusions: Conclusions) -> str:
    """Perplexity and score over rank and sparsity, of the combination with most pillars that has both."""
    both = [c for c in conclusions.found if set(_SETTINGS) <= set(c.point)]
    if not both:
        return "no combination with masking and adapters finished"
    fullest = max((c.combination for c in both), key=COMBINATIONS.index)
    shown = [c for c in both if c.combination == fullest]
    if len({tuple(c.point[key] for key in _SETTINGS) for c in shown}) < 2:
        return "one rank and one sparsity are no surface"
    panels: list[tuple[str, Callable[[Configuration], float | None], str]] = [
        ("perplexity of the test text", lambda c: c.perplexity[MEASURES[0]], "cividis_r"),
        ("score, over the baseline's", lambda c: c.score, "cividis"),
    ]
    panels = [panel for panel in panels if all(panel[1](c) is not None for c in shown)]
    figure.set_size_inches(max(7, 6 * len(panels)), 5.5)
    is_grid = all(len({c.point[key] for c in shown}) <= _MOST_LEVELS for key in _SETTINGS)
    tops = []
    for axes, (label, value, colours) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        cells = _means(shown, value)
        (_cells if is_grid else _dots)(axes, cells, colours)
        axes.set(xlabel=GRID_KEYS["sparsity"], ylabel=GRID_KEYS["rank"])
        axes.set_title(label, loc="left")
        extreme = max if label.startswith("score") else min
        rank, sparsity = extreme(cells, key=lambda place: cells[place])
        tops.append(f"{label.split()[0].rstrip(',')} at rank {rank:g} and sparsity {sparsity:g}")
    which = "All three pillars" if fullest == "all" else "Masking and adapters"
    title(figure, f"{which}, on the test text: best {listed(tops)}")
    return ""


def _means(
    shown: Sequence[Configuration], value: Callable[[Configuration], float | None]
) -> dict[tuple[float, float], float]:
    """Geometric means over the settings that are not shown, by rank and sparsity."""
    cells: dict[tuple[float, float], list[float]] = defaultdict(list)
    for configuration in shown:
        cells[configuration.point["rank"], configuration.point["sparsity"]].append(value(configuration) or 0.0)
    return {place: statistics.geometric_mean(values) for place, values in cells.items()}


def _cells(axes: Any, cells: Mapping[tuple[float, float], float], colours: str) -> None:
    """A heat map over the values of both settings."""
    ranks, sparsities = (sorted({place[index] for place in cells}) for index in range(2))
    heat_map(axes, [[cells.get((r, s), math.nan) for s in sparsities] for r in ranks], colours, "{:.2f}")
    axes.set_xticks(range(len(sparsities)), [f"{value:g}" for value in sparsities])
    axes.set_yticks(range(len(ranks)), [f"{value:g}" for value in ranks])


def _dots(axes: Any, cells: Mapping[tuple[float, float], float], colours: str) -> None:
    """One dot per point of a free search."""
    ranks, sparsities = zip(*cells, strict=True)
    values = list(cells.values())
    dots = axes.scatter(sparsities, ranks, c=values, cmap=colours, s=110, edgecolors="black", linewidths=0.5)
    axes.figure.colorbar(dots, ax=axes)
