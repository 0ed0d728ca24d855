"""The plots of an ablation, as PNGs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research.ablation.conclusions import Conclusions
from research.ablation.effect_plots import draw_effects, draw_impacts
from research.ablation.efficiency_plots import draw_fronts, draw_surface
from research.ablation.layer_plots import draw_allocation, draw_correlation, draw_sparsity
from research.ablation.plot_parts import STYLE
from yunmin.errors import MissingExtraError


@dataclass(frozen=True)
class Plot:
    """A plot of the report.

    Attributes:
        name: of the file, without its ending.
        title: what it shows.
        caption: how to read it.
        draw: draws conclusions into a figure; returns why it cannot, or nothing.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Any, Conclusions], str]

    @property
    def file(self) -> str:
        return f"{self.name}.png"


PLOTS = (
    Plot(
        "pillar_effects",
        "Effects of the pillars",
        "Change of perplexity, one difference per seed; lines are 95 % intervals of the mean, filled marks differ "
        "significantly after correction. To the left is better.",
        draw_effects,
    ),
    Plot(
        "pareto_fronts",
        "Pareto fronts",
        "A mark is one configuration, over its seeds. The line joins those that no other one beats in the two "
        "quantities of the panel alone; the table above takes three together. Down and left is better.",
        draw_fronts,
    ),
    Plot(
        "efficiency_surface",
        "Efficiency surface",
        "Geometric means over seeds and over the settings that are not shown.",
        draw_surface,
    ),
    Plot(
        "parameter_impacts",
        "Impact of each setting",
        "Change of float32 perplexity against the mean over a setting's values, all else being equal; lines are 95 % "
        "intervals over seeds.",
        draw_impacts,
    ),
    Plot(
        "sparsity_by_layer",
        "Sparsity by layer",
        "Share of inner channels cut, mean over the experiments of a row.",
        draw_sparsity,
    ),
    Plot(
        "allocation_maps",
        "Allocation of adapters",
        "Share of the experiments with adapters that gave a projection of a layer LoRA, IA3, or nothing.",
        draw_allocation,
    ),
    Plot(
        "scan_correlation",
        "Correlation of neighbours in scan order",
        "Mean |correlation| of the activations of neighbouring channels, as they started and in the learned order, "
        "whatever it was solved for; lines reach from the smallest to the largest experiment.",
        draw_correlation,
    ),
)


def draw_plots(folder: Path, conclusions: Conclusions) -> dict[str, str]:
    """Draws all plots; the same study gives the same bytes.

    Args:
        folder: for the files; made where it is not there.
        conclusions: of the study.

    Returns:
        Why a plot was not drawn, by its name; empty where it was.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise MissingExtraError("matplotlib", "research", "drawing plots (or --disable-visualization)") from None
    folder.mkdir(parents=True, exist_ok=True)
    reasons = {}
    for plot in PLOTS:
        (folder / plot.file).unlink(missing_ok=True)
        with matplotlib.rc_context(STYLE):
            figure = Figure(layout="constrained")
            reasons[plot.name] = plot.draw(figure, conclusions)
            if not reasons[plot.name]:
                FigureCanvasAgg(figure)
                figure.savefig(folder / plot.file, format="png", metadata={"Software": None})
    return reasons
