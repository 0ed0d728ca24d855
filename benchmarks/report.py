"""Tables and plots of what was measured."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from yunmin.errors import RequestError

_SIZES = (
    ("parameters", "parameters"),
    ("weight bytes", "weight_bytes"),
    ("artifact bytes", "artifact_bytes"),
    ("FLOPs per token", "flops_per_token"),
    ("state bytes", "state_bytes"),
    ("peak memory (MB)", "peak_memory_bytes"),
    ("of it before loading (MB)", "memory_before_load_bytes"),
    ("peak device memory (MB)", "peak_device_memory_bytes"),
)
_SPEEDS = (
    ("prefill tokens/s", "prefill_tokens_per_s"),
    ("time to first token (ms)", "time_to_first_token_ms"),
    ("decode tokens/s", "decode_tokens_per_s"),
    ("per token, p50 (ms)", "per_token_p50_ms"),
    ("per token, p95 (ms)", "per_token_p95_ms"),
)


def text_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as plain text: the first column to the left, the others to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(escape(column), justify="left" if index == 0 else "right", no_wrap=index > 0)
    for row in rows:
        table.add_row(*map(escape, row))
    buffer = io.StringIO()
    Console(file=buffer, width=110, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()).strip("\n")


def read_result(path: Path, benchmark: str) -> dict[str, Any]:
    """An earlier result of `yunmin bench BENCHMARK`.

    Raises:
        RequestError: the file holds something else.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise RequestError("--report", f"{path}: expected a {benchmark}.json, found no JSON") from None
    if not isinstance(result, dict) or result.get("benchmark") != benchmark:
        raise RequestError("--report", f"{path}: expected a result of yunmin bench {benchmark}, found another file")
    return result


def comparison_row(name: str, values: Sequence[float | None], form: Callable[[float], str]) -> list[str]:
    """A row of formatted values; of two, with the ratio of the first to the second."""
    row = [name, *("–" if value is None else form(value) for value in values)]
    if len(values) == 2:
        first, second = values
        row.append("–" if first is None or not second else f"{first / second:.3f}")
    return row


def short_names(paths: Sequence[str]) -> list[str]:
    """The ends of paths, as long as it takes to tell them apart."""
    parts = [Path(path).parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = [str(Path(*part[-count:])) for part in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return list(paths)


def latency_table(result: dict[str, Any]) -> str:
    """The result of `benchmarks.latency.measure_models` as a table, with the machine below it."""
    models = result["models"]
    names = short_names([model["source"] for model in models])
    columns = ["", *names] + (["ratio"] if len(models) == 2 else [])
    rows = []
    for label, key in _SIZES:
        values = [model.get(key) for model in models]
        if any(value is not None for value in values):
            rows.append(comparison_row(label, values, _megabytes if label.endswith("(MB)") else _integer))
    for length in result["settings"]["prompt_tokens"]:
        rows.append([f"prompt of {length} tokens"])
        for label, key in _SPEEDS:
            rows.append(comparison_row(f"  {label}", [m["summary"][str(length)][key] for m in models], _decimal))
    machine, settings, model = result["machine"], result["settings"], models[0]
    threads = model["threads"]
    facts = [
        machine["cpu"],
        f"{machine['cores_usable']} cores",
        f"{threads} thread{'s' if threads > 1 else ''}",
        model["device"],
        f"{model['runtime']} runtime",
        f"torch {machine['torch']}",
        f"load {machine['load_average_1min']:g} before the start",
    ]
    method = f"medians of {settings['repeats']} repeats, {settings['new_tokens']} new tokens, one request at a time"
    return "\n".join([text_table("Latency", columns, rows), "", f"  {method}", f"  {', '.join(facts)}"])


def plot_latency(result: dict[str, Any], path: Path) -> None:
    """Prefill and decode rates over the prompt length, and the spread of decode steps, as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    lengths = result["settings"]["prompt_tokens"]
    figure, (prefill, decode, steps) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    positions = range(len(lengths))
    width = 0.8 / len(result["models"])
    names = short_names([model["source"] for model in result["models"]])
    for index, (name, model) in enumerate(zip(names, result["models"], strict=True)):
        for axes, key in ((prefill, "prefill_tokens_per_s"), (decode, "decode_tokens_per_s")):
            heights = [model["summary"][str(length)][key] for length in lengths]
            left = [position + index * width for position in positions]
            axes.bar(left, heights, width, label=name, align="edge")
        milliseconds = sorted(
            1e3 * step for runs in model["samples"].values() for sample in runs for step in sample["step_s"]
        )
        shares = [(rank + 1) / len(milliseconds) for rank in range(len(milliseconds))]
        steps.plot(milliseconds, shares, label=name)
    for axes, title in ((prefill, "Prefill"), (decode, "Decode")):
        axes.set(title=title, xlabel="prompt tokens", ylabel="tokens per second")
        axes.set_xticks([position + 0.4 for position in positions], [str(length) for length in lengths])
    steps.set(title="Decode steps", xlabel="milliseconds per token", ylabel="share of steps", ylim=(0, 1))
    steps.legend(fontsize="small")
    machine = result["machine"]
    figure.suptitle(f"{machine['cpu']}, {result['models'][0]['threads']} threads, torch {machine['torch']}", fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _integer(value: float) -> str:
    return f"{value:,.0f}"


def _decimal(value: float) -> str:
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:,.1f}"
