"""The result of `benchmarks.train` as tables and plots."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.compare_plots import styles_of
from benchmarks.compare_tables import Listing, Table, number

_PEERS = ("transformers", "mambapy")


def train_tables(result: dict[str, Any]) -> list[Table | Listing]:
    """Everything to show of a result."""
    machine, limits = result["machine"], result["limits"]
    rates = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in limits["flops_per_s"].items())
    load = f"load {machine['load_average_1min']:g} before and {result['load_average_after']:g} after"
    found: list[Table | Listing] = [
        Table(
            f"One training step, {result['model']['name']}, {result['settings']['threads']} threads",
            ("batch x length", "who", "step s", "tokens/s", "memory MB", "loss", "samples"),
            tuple(_steps(result)),
            (
                "step: forward, cross-entropy at all positions, backward; no optimizer.",
                "memory: what a step adds to the loaded model at its peak, gradients of the weights included.",
            ),
        ),
        Table(
            "Ours against peers and this machine's limit",
            ("batch x length", "ours", *(f"x {peer}" for peer in _PEERS), "memory / mambapy", "limit s", "of limit"),
            tuple(_ratios(result)),
            (
                "x peer: how many times as fast. limit: the products of projections and head alone, thrice a forward.",
                f"products at most: {rates}; {machine['cpu']}, {load}; {result['time']}",
            ),
        ),
        Listing("Who ran", tuple(_versions(result))),
        Listing("Not measured", tuple(_missing(result))),
    ]
    return [part for part in found if not part.is_empty]


def plot_train(result: dict[str, Any], path: Path) -> None:
    """Time and memory of a step over its tokens, as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for size in result["sizes"] for name in size["steps"]))
    styles = styles_of([{"name": name, "is_ours": name.startswith("ours")} for name in names])
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    ordered = sorted(result["sizes"], key=lambda size: size["tokens"])
    for axes, key, label in (
        (panels[0], "step_s", "seconds per step"),
        (panels[1], "memory_mb", "MB beyond the model"),
    ):
        for name in names:
            points = [(i, size["steps"][name][key]) for i, size in enumerate(ordered) if name in size["steps"]]
            axes.plot(*zip(*points, strict=True), label=name, **styles[name])
        axes.set(yscale="log", xlabel="batch x length", ylabel=f"{label} (less is better)")
        axes.set_xticks(range(len(ordered)), [size["size"] for size in ordered])
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.yaxis.set_minor_formatter("")
        axes.grid(visible=True, which="major", alpha=0.3)
    for product, dashes in (("fp32", ":"), ("bf16", "--")):
        limits = [size["limits_s"][product] for size in ordered]
        panels[0].plot(range(len(ordered)), limits, dashes, color="grey", label=f"limit {product}")
    panels[0].legend(frameon=False)
    title = f"One training step, {result['model']['name']}, {result['settings']['threads']} threads"
    figure.suptitle(f"{title}, {result['machine']['cpu']}", fontsize=11)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _steps(result: dict[str, Any]) -> Iterable[tuple[str, ...]]:
    for size in result["sizes"]:
        for name, step in size["steps"].items():
            figures = (number(step["step_s"]), number(step["tokens_per_s"]), number(step["memory_mb"]))
            yield (size["size"], name, *figures, f"{step['loss']:.4f}", str(step["samples"]))


def _ratios(result: dict[str, Any]) -> Iterable[tuple[str, ...]]:
    for size in result["sizes"]:
        steps = size["steps"]
        for name, step in steps.items():
            if not name.startswith("ours"):
                continue
            faster = [number(steps[peer]["step_s"] / step["step_s"]) if peer in steps else "–" for peer in _PEERS]
            memory = f"{step['memory_mb'] / steps['mambapy']['memory_mb']:.2f}" if "mambapy" in steps else "–"
            limit = size["limits_s"][name.removeprefix("ours ")]
            yield (size["size"], name, *faster, memory, number(limit), f"{limit / step['step_s']:.2f}")


def _versions(result: dict[str, Any]) -> Iterable[tuple[str, str]]:
    found: dict[str, str] = {}
    for size in result["sizes"]:
        for name, versions in size["versions"].items():
            found[name] = ", ".join(f"{package} {text}" for package, text in versions.items())
    yield from found.items()


def _missing(result: dict[str, Any]) -> Iterable[tuple[str, str]]:
    for size in result["sizes"]:
        for name, note in size["notes"].items():
            yield f"{name}, {size['size']}", note
