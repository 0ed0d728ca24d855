"""Plots of what the pillars did to each layer."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from research.ablation.conclusions import Conclusions
from research.ablation.outcome import Outcome, has_pillar
from research.ablation.plot_parts import MARKS, heat_map, title

_PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")
_MOST_LAYERS = 6  # of panels that stand side by side
_KINDS = {"lora": "LoRA", "ia3": "IA3", "frozen": "frozen"}


def _layers(outcomes: Sequence[Outcome], key: str, pillar: str) -> list[tuple[Outcome, Any]]:
    """What was recorded of the layers of each experiment with a pillar."""
    found = [(o, (o.result.get("layers") or {}).get(key)) for o in outcomes if has_pillar(o.combination, pillar)]
    return [(outcome, value) for outcome, value in found if value]


def draw_sparsity(figure: Any, conclusions: Conclusions) -> str:
    """The share of channels cut in each layer, by combination and target."""
    recorded = _layers(conclusions.outcomes, "channel_sparsity", "masking")
    if not recorded:
        return "no experiment with masking recorded its layers"
    rows: dict[tuple[str, float], list[Sequence[float]]] = defaultdict(list)
    targets = sorted({outcome.point.get("sparsity", math.nan) for outcome, _ in recorded})
    for outcome, shares in recorded:
        target = outcome.point.get("sparsity", math.nan) if len(targets) <= 5 else math.nan  # a free search has many
        rows[outcome.combination, target].append(shares)
    table = [[100 * statistics.fmean(shares) for shares in zip(*found, strict=True)] for found in rows.values()]
    labels = [f"{name}, target {target:g}".removesuffix(", target nan") for name, target in rows]
    n_layers = len(table[0])
    figure.set_size_inches(max(8, 4 + 0.6 * n_layers), 2 + 0.45 * len(rows))
    axes = figure.add_subplot()
    heat_map(axes, table, "cividis", "{:.0f}", (0, 100))
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xticks(range(n_layers))
    axes.set(xlabel="layer", ylabel="")
    axes.set_title("inner channels cut, %", loc="left")
    spread = max(max(shares) - min(shares) for _, shares in recorded)
    title(figure, _sparsity_title(100 * spread))
    return ""


def _sparsity_title(points: float) -> str:
    if points < 0.05:
        return "Every layer of an experiment is cut alike"
    return f"Layers of one experiment differ by up to {points:.0f} points in what is cut"


def draw_allocation(figure: Any, conclusions: Conclusions) -> str:
    """How often each projection of each layer got LoRA, IA3 or nothing."""
    recorded = [allocation for _, allocation in _layers(conclusions.outcomes, "allocation", "peft")]
    if not recorded:
        return "no experiment with adapters recorded its allocation"
    n_layers = 1 + max(int(name.split(".")[0]) for found in recorded for names in found.values() for name in names)
    is_deep = n_layers > _MOST_LAYERS
    figure.set_size_inches(*((2.5 + 0.55 * n_layers, 8) if is_deep else (11, 4.2)))
    panels = figure.subplots(*((len(_KINDS), 1) if is_deep else (1, len(_KINDS))), sharex=True, sharey=True)
    shares = {kind: _shares(recorded, kind, n_layers) for kind in _KINDS}
    for axes, kind in zip(panels, _KINDS, strict=True):
        heat_map(axes, shares[kind], "cividis", "{:.0f}", (0, 100))
        axes.set_xticks(range(n_layers))
        axes.set_yticks(range(len(_PROJECTIONS)), _PROJECTIONS)
        axes.set_title(f"{_KINDS[kind]}, % of {len(recorded)} experiments", loc="left")
    for axes in panels[-1:] if is_deep else panels:
        axes.set_xlabel("layer")
    title(figure, _allocation_title(shares["lora"]))
    return ""


def _shares(recorded: Sequence[Mapping[str, Sequence[str]]], kind: str, n_layers: int) -> list[list[float]]:
    """Percent of experiments, by projection and layer."""
    counts: dict[str, int] = defaultdict(int)
    for allocation in recorded:
        for name in allocation.get(kind, ()):
            counts[name] += 1
    return [
        [100 * counts[f"{layer}.{projection}"] / len(recorded) for layer in range(n_layers)]
        for projection in _PROJECTIONS
    ]


def _allocation_title(lora: Sequence[Sequence[float]]) -> str:
    means = {name: statistics.fmean(row) for name, row in zip(_PROJECTIONS, lora, strict=True)}
    if not any(means.values()):
        return "No projection got LoRA"
    most = max(means, key=lambda name: means[name])
    return f"LoRA went to {most} most often: {means[most]:.0f} % of its layers"


def draw_correlation(figure: Any, conclusions: Conclusions) -> str:
    """The correlation of neighbouring channels in each layer, before and after the order was learned."""
    recorded: dict[str, list[Mapping[str, Sequence[float]]]] = defaultdict(list)
    for outcome, found in _layers(conclusions.outcomes, "scan_correlation", "scan"):
        recorded[outcome.combination].append(found)
    if not recorded:
        return "no experiment with a scan order recorded its correlations"
    n_layers = len(next(iter(recorded.values()))[0]["before"])
    figure.set_size_inches(max(10, 3 + 0.7 * n_layers), 5.5)
    axes = figure.add_subplot()
    started = [found["before"] for experiments in recorded.values() for found in experiments]
    _by_layer(axes, started, -0.32, "as the channels started", "#777777", "_")
    for index, (combination, experiments) in enumerate(recorded.items()):
        colour, marker = MARKS[combination]
        learned = [found["after"] for found in experiments]
        _by_layer(axes, learned, 0.16 * index - 0.16, f"learned: {combination}", colour, marker)
    axes.set_xticks(range(n_layers))
    axes.margins(x=0.05)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="layer", ylabel="mean |correlation| of neighbours")
    axes.grid(visible=True, axis="y", alpha=0.25)
    figure.legend(loc="outside lower center", ncols=3)
    before = statistics.fmean(value for values in started for value in values)
    after = statistics.fmean(value for found in recorded.values() for one in found for value in one["after"])
    title(figure, f"Neighbours in scan order: mean |correlation| from {before:.2f} to {after:.2f}")
    return ""


def _by_layer(
    axes: Any, experiments: Sequence[Sequence[float]], offset: float, label: str, colour: str, marker: str
) -> None:
    """Means over experiments, with lines from the smallest to the largest."""
    by_layer = list(zip(*experiments, strict=True))  # layers of experiments
    places = [layer + offset for layer in range(len(by_layer))]
    axes.vlines(places, [min(v) for v in by_layer], [max(v) for v in by_layer], color=colour, linewidth=2.5)
    look = {"markersize": 10, "markeredgecolor": colour if marker == "_" else "black", "markeredgewidth": 0.5}
    if marker == "_":
        look |= {"markersize": 14, "markeredgewidth": 3}
    means = [statistics.fmean(values) for values in by_layer]
    axes.plot(places, means, marker, color=colour, label=label, **look)
