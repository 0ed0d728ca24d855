"""Writes what an ablation found: reports for people, tables and JSON for programs."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from research.ablation.conclusions import conclude
from research.ablation.content import PLOT_FOLDER, report_blocks
from research.ablation.outcome import GRID_KEYS, PHASES
from research.ablation.plots import draw_plots
from research.reports.document import to_markdown
from research.reports.page import to_html
from yunmin.files import atomic_file

RESULTS_FILE = "comprehensive_results.json"
TABLE_FILE = "results.csv"
REPORT_FILE = "RESEARCH_REPORT.md"
PAGE_FILE = "report.html"
_COLUMNS = {
    "test_perplexity": ("test", "token_perplexity"),
    "test_bits_per_byte": ("test", "bits_per_byte"),
    "test_word_perplexity": ("test", "word_perplexity"),
    "test_tokens": ("test", "tokens"),
    "int4_perplexity": ("int4", "token_perplexity"),
    "parameters": ("cost", "parameters"),
    "weight_bytes": ("cost", "weight_bytes"),
    "flops_per_token": ("cost", "flops_per_token"),
    "state_bytes": ("cost", "state_bytes"),
    "prefill_ms": ("latency", "prefill_ms"),
    "decode_ms": ("latency", "decode_ms"),
    "adapted_parameters": ("adapted_parameters",),
    "training_memory_bytes": ("training_memory_bytes",),
    "train_seconds": ("seconds", "train"),
    "export_seconds": ("seconds", "export"),
    "measure_seconds": ("seconds", "measure"),
}


def write_report(folder: Path, results: list[dict[str, Any]], settings: dict[str, Any], *, plots: bool) -> None:
    """Writes all files of a report, each whole or not at all; earlier ones give way.

    Args:
        folder: of the study.
        results: one per distinct experiment, as `research.studies.experiments` records them, with `combination`,
            `point` and `seed`; a failed one has these and `error`, one line.
        settings: of the study, shown as they are. `project` and `mode` go into the title, `command` says how to run it
            again.
        plots: whether plots are drawn.

    Raises:
        MissingExtraError: scipy, or matplotlib for plots, is not installed.
    """
    conclusions = conclude(results)
    not_drawn = draw_plots(folder / PLOT_FOLDER, conclusions) if plots else None
    blocks = report_blocks(conclusions, results, settings, not_drawn)
    everything = {"settings": settings, "conclusions": conclusions.describe(), "results": results}
    _write(folder / RESULTS_FILE, json.dumps(_finite(everything), ensure_ascii=False, indent=1, allow_nan=False) + "\n")
    _write_table(folder / TABLE_FILE, results)
    _write(folder / REPORT_FILE, to_markdown(blocks))
    _write(folder / PAGE_FILE, to_html(blocks, folder))


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def _finite(value: Any) -> Any:
    """The same without what JSON does not know: infinite numbers become null, tuples lists."""
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _write_table(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """One line per experiment."""
    phases = [f"{kind}_{phase}" for kind in ("validation_perplexity", "trainable") for phase in PHASES]
    header = ["key", "combination", "seed", *GRID_KEYS, *_COLUMNS, *phases, "error"]
    with atomic_file(path) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, header, restval="")
        writer.writeheader()
        for result in results:
            row = {name: _at(result, path_of) for name, path_of in _COLUMNS.items()}
            row |= {key: result.get("point", {}).get(key, "") for key in GRID_KEYS}
            for phase in PHASES:
                row[f"validation_perplexity_{phase}"] = _at(result, ("validation_perplexity", phase))
                row[f"trainable_{phase}"] = _at(result, ("trainable_parameters", phase))
            row |= {key: _at(result, (key,)) for key in ("key", "combination", "seed", "error")}
            writer.writerow(row)


def _at(result: Mapping[str, Any], path: Sequence[str]) -> Any:
    value: Any = result
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return "" if value is None else value
