"""What all plots of an ablation share: their style, a mark for each combination, titles, heat maps."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

from research.ablation.outcome import COMBINATIONS

STYLE = {
    "font.size": 13,
    "axes.titlesize": 14,
    "figure.titlesize": 15,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.dpi": 110,
}
BLUE, RED = "#0072B2", "#D55E00"
# Okabe and Ito's colours, which the colour-blind tell apart, each with a marker of its own
_MARKS = ("#000000*", "#56B4E9o", "#E69F00s", "#009E73^", "#0072B2D", "#F0E442v", "#CC79A7P", "#D55E00X")
MARKS = {name: (mark[:-1], mark[-1]) for name, mark in zip(COMBINATIONS, _MARKS, strict=True)}


def title(figure: Any, text: str) -> None:
    """Titles a figure with a sentence, in lines that fit its width."""
    characters = int(9.5 * figure.get_figwidth())
    figure.suptitle("\n".join(textwrap.wrap(text, characters)), x=0.01, ha="left")


def heat_map(
    axes: Any, table: Sequence[Sequence[float]], colours: str, form: str, limits: tuple[float, float] | None = None
) -> None:
    """Draws a table as coloured cells with their numbers; what is not a number stays blank.

    Args:
        axes: to draw into.
        table: rows of values, the first at the top.
        colours: a colour map's name.
        form: of the numbers.
        limits: values of the first and the last colour; None takes the smallest and the largest value.
    """
    known = [value for row in table for value in row if not math.isnan(value)]
    low, high = limits or (min(known), max(known))
    image = axes.imshow(table, cmap=colours, aspect="auto", vmin=low, vmax=high)
    for row, values in enumerate(table):
        for column, value in enumerate(values):
            if not math.isnan(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                is_dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
                colour = "white" if is_dark else "black"
                axes.text(column, row, form.format(value), ha="center", va="center", color=colour, fontsize=12)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
