"""Plots of what pillars and settings do to perplexity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from research.ablation.comparisons import Comparison, setting_effects
from research.ablation.conclusions import Conclusions
from research.ablation.outcome import GRID_KEYS, MEASURES
from research.ablation.plot_parts import BLUE, RED, title
from research.reports.significance import Paired
from research.reports.words import listed

_MEASURE_MARKS = {"float32": (BLUE, "o"), "int4": (RED, "s")}
_GROUPS = {"baseline": "a combination against the baseline", "pillar": "a pillar, over all combinations of the others"}


def draw_effects(figure: Any, conclusions: Conclusions) -> str:
    """Changes of perplexity with their intervals: of combinations and, over all of them, of pillars."""
    shown = [c for c in conclusions.comparisons if c.kind in _GROUPS]
    if not shown:
        return "there is nothing to compare"
    measures = [measure for measure in MEASURES if any(c.measure == measure for c in shown)]
    places: dict[tuple[str, str], float] = {}
    place = 0.0
    for kind in _GROUPS:
        names = dict.fromkeys(c.subject for c in shown if c.kind == kind)
        places |= {(kind, name): place - row for row, name in enumerate(names)}
        place -= len(names) + 1
    figure.set_size_inches(10, 2.2 + 0.42 * -place)
    axes = figure.add_subplot()
    for comparison in shown:
        offset = 0.16 * (len(measures) - 1) * (1 - 2 * measures.index(comparison.measure))
        _forest_row(axes, comparison, places[comparison.kind, comparison.subject] + offset)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(list(places.values()), [name for _, name in places])
    for kind, text in _GROUPS.items():
        rows = [place for (group, _), place in places.items() if group == kind]
        if rows:
            look = {"fontsize": 12, "style": "italic", "backgroundcolor": "white"}
            axes.text(0.01, max(rows) + 0.6, text, transform=axes.get_yaxis_transform(), **look)
    axes.set_ylim(place + 1.4, 1.3)
    axes.grid(visible=True, axis="x", alpha=0.25)
    axes.set_xlabel("change of perplexity, %")
    for measure in measures:
        colour, marker = _MEASURE_MARKS[measure]
        axes.plot([], [], marker, color=colour, markersize=9, label=f"{measure} weights")
    axes.plot([], [], "o", color="grey", markerfacecolor="white", markersize=9, label="not significant")
    figure.legend(loc="outside lower center", ncols=3)
    title(figure, _effects_title([c for c in shown if c.kind == "baseline" and c.measure == MEASURES[0]]))
    return ""


def _effects_title(against_baseline: list[Comparison]) -> str:
    significant = [c.subject for c in against_baseline if c.is_significant]
    if not significant:
        return "No combination differs significantly from the baseline in float32"
    if len(significant) == len(against_baseline):
        return "Every combination differs significantly from the baseline in float32"
    return f"Different from the baseline in float32: {listed(significant)}"


def _forest_row(axes: Any, comparison: Comparison, place: float) -> None:
    colour, marker = _MEASURE_MARKS[comparison.measure]
    found = comparison.found
    if found.change_interval is not None:
        axes.plot([100 * end for end in found.change_interval], [place, place], color=colour, linewidth=2)
    face = colour if comparison.is_significant else "white"
    axes.plot(100 * found.change, place, marker, color=colour, markerfacecolor=face, markersize=9)


def draw_impacts(figure: Any, conclusions: Conclusions) -> str:
    """How each value of a setting moves perplexity, all else being equal."""
    effects = {key: found for key in GRID_KEYS if (found := setting_effects(conclusions.outcomes, key))}
    if not effects:
        return "no setting has two values at which all else is equal"
    figure.set_size_inches(max(8, 3.8 * len(effects)), 5)
    panels = figure.subplots(1, len(effects), sharey=True, squeeze=False).flat
    for axes, (key, found) in zip(panels, effects.items(), strict=True):
        for place, effect in enumerate(found.values()):
            if effect.interval is not None:
                axes.plot([place, place], [_percent(end) for end in effect.interval], color=BLUE, linewidth=2.5)
        axes.plot([_percent(effect.mean) for effect in found.values()], "o-", color=BLUE, markersize=9, linewidth=1)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xticks(range(len(found)), [f"{level:g}" for level in found])
        axes.margins(x=0.2)
        axes.set_xlabel(GRID_KEYS[key])
        axes.grid(visible=True, axis="y", alpha=0.25)
        axes.set_title(f"{key}: {_percent(_span(found)):.2g} % from end to end", loc="left")
    figure.axes[0].set_ylabel("change of perplexity, %")
    largest = max(effects, key=lambda key: _span(effects[key]))
    tested = [c for c in conclusions.comparisons if c.kind == "setting" and c.name.startswith(f"{largest} ")]
    is_shown = any(comparison.is_significant for comparison in tested)
    most = f"Perplexity depends most on the {GRID_KEYS[largest]}"
    title(figure, most if is_shown else "Perplexity by setting; the largest difference is not significant")
    return ""


def _span(found: Mapping[float, Paired]) -> float:
    means = [effect.mean for effect in found.values()]
    return max(means) - min(means)


def _percent(log_ratio: float) -> float:
    return 100 * math.expm1(log_ratio)
