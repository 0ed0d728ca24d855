"""The curve of a search as a picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CURVE_FILE = "perplexity_curve.png"


def can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def plot_curve(path: Path, search: Mapping[str, Any]) -> None:
    """Perplexity over bytes, one line per precision, with the limit.

    Args:
        path: of the PNG.
        search: as a manifest's provenance has it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for precision in dict.fromkeys(candidate["precision"] for candidate in search["curve"]):
        points = [c for c in search["curve"] if c["precision"] == precision]
        megabytes = [candidate["bytes"] / 1e6 for candidate in points]
        axes.plot(megabytes, [candidate["perplexity"] for candidate in points], "o-", label=precision)
    axes.axhline(search["limit"], color="gray", linestyle="--", label="limit")
    # what is far beyond the limit would flatten the rest
    shown = [c["perplexity"] for c in search["curve"] if c["perplexity"] < 1.5 * search["limit"]]
    axes.set(xlabel="MB of weights", ylabel="perplexity", ylim=(0.99 * min(shown), 1.01 * max(*shown, search["limit"])))
    axes.legend()
    FigureCanvasAgg(figure).print_png(str(path))
