"""Pillar 3: LoRA and IA3 allotted by importance, against uniform and random allotment, IA3 alone, full fine-tuning.

Importance is measured in two ways: by the spectra of the weights' gradients, which give each projection a rank, too,
and by mean |g dL/dg| of a multiplier g on its outputs. LoRA begins by chance or along the gradients. Base models learn
one text; then each way learns another one, for as many steps. All ways with LoRA train as many numbers, up to what a
rank is. Each has the learning rate that is best for it on the tuning text, with the first seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from research.pillars.rates import search_rate, sweep
from research.pillars.study import Study
from research.pillars.summary import TABLE_HEADER, Line, compared, mean, said, table_row
from research.reports import words
from research.reports.document import Block, Bullets, Paragraph, Table
from research.studies.experiments import NO_PILLARS, Experiment, Laboratory

TITLE = "Hybrid adapters"
QUESTION = "Does allotting LoRA and IA3 by importance adapt better than uniform LoRA that trains as many numbers?"
KEEPS = False  # whether artifacts are needed to measure further
ADAPTS = True  # whether anything is trained after the base models
REFERENCE = "uniform LoRA"
BUDGETS: dict[str, int] = {"tiny": 3000, "2m": 40_000, "10m": 120_000}  # trainable numbers, by the model's size
RATES, FULL_RATES = (3e-3, 1e-2, 3e-2), (3e-4, 1e-3, 3e-3)
_PEFT: dict[str, Any] = {
    "scan_mode": "none",
    "enable_masking": False,
    "dense_share": 0.0,
    "adapter_share": 1.0,
    "lora_targets": ["in_proj", "x_proj", "dt_proj", "out_proj"],
    "peft_dropout": 0.0,
    "importance": "gradient",
    "lora_init": "random",
}
_STEPS = 20  # batches that importance is measured with
_SHARES: dict[str, Any] = {"lora_share": 0.5, "ia3_share": 0.3}
_SPECTRUM: dict[str, Any] = {**_SHARES, "importance": "spectrum", "importance_steps": _STEPS}
_ALONG_GRADIENTS: dict[str, Any] = {"lora_init": "gradient", "importance_steps": _STEPS}
FULL = "full fine-tuning"
WAYS: dict[str, dict[str, Any]] = {
    "hybrid by spectrum, along gradients": {**_SPECTRUM, "lora_init": "gradient"},
    "hybrid by spectrum": _SPECTRUM,
    "hybrid by |g dL/dg|": {**_SHARES, "importance_steps": _STEPS},
    "hybrid at random": {**_SHARES, "allocation": "random"},
    "uniform LoRA": {"allocation": "uniform"},
    "uniform LoRA, along gradients": {"allocation": "uniform", **_ALONG_GRADIENTS},
    "uniform LoRA, linear projections": {"allocation": "uniform", "lora_targets": ["linear"]},
    "uniform LoRA, S6 projections": {"allocation": "uniform", "lora_targets": ["s6"]},
    "IA3 everywhere": {"allocation": "random", "lora_share": 0.0, "ia3_share": 1.0},
    FULL: {},
}


def experiments(study: Study, laboratory: Laboratory) -> list[Experiment]:
    """Rates of every way with the first seed; the other seeds at the best one, once it is known."""
    return sweep(WAYS, study.seeds, partial(_search, study, laboratory), partial(_experiment, study))


def collect(study: Study, laboratory: Laboratory) -> dict[str, Any]:
    """What was found.

    Returns:
        By way: `perplexity` on the test text for each seed, the best `rate`, and the `trainable` numbers.
    """
    found: dict[str, Any] = {"perplexity": {}, "rate": {}, "trainable": {}}
    for way in WAYS:
        _, rate = _search(study, laboratory, way)
        assert rate is not None
        results = [laboratory.run(_experiment(study, way, rate, seed)) for seed in study.seeds]
        found["perplexity"][way] = [result["test"]["token_perplexity"] for result in results]
        found["rate"][way] = rate
        found["trainable"][way] = max(result["adapted_parameters"] for result in results)
    return found


def lines(found: Mapping[str, Any]) -> list[Line]:
    """Every way against uniform LoRA."""
    return compared({"": found["perplexity"]}, REFERENCE)[""]


def blocks(found: Mapping[str, Any]) -> list[Block]:
    """What the comparison says."""
    by_way = {line.name: line for line in lines(found)}
    rows = [
        (way, f"{found['trainable'][way]:,}", f"{found['rate'][way]:g}", *table_row(line))
        for way, line in by_way.items()
    ]
    hybrid = next(iter(WAYS))
    share = 1 - found["trainable"][hybrid] / found["trainable"][FULL]
    clauses = [said(line, way, REFERENCE) for way, line in by_way.items() if way not in (REFERENCE, FULL)]
    return [
        Bullets([f"{clause}." for clause in clauses]),
        Paragraph(f"The first trains {words.percent(share)} fewer numbers than full fine-tuning."),
        Table(
            ("way", "trained", "learning rate", *TABLE_HEADER),
            rows,
            note="Test perplexity after adaptation; changes are against uniform LoRA on all four projections. Ways "
            f"with LoRA train at most {BUDGETS[found['settings']['size']]:,} numbers; those that measure gradients "
            f"first look at {_STEPS} batches more.",
        ),
    ]


def plot(found: Mapping[str, Any], axes: Any) -> None:
    """Perplexity by way, on a logarithmic scale; small marks are seeds, large ones their mean."""
    for place, way in enumerate(reversed(WAYS)):
        values = found["perplexity"][way]
        axes.plot(values, [place] * len(values), "o", alpha=0.5, color="gray", markersize=4)
        axes.plot(mean(values), place, "o", color="tab:orange" if way == REFERENCE else "tab:blue")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_yticks(range(len(WAYS)), [f"{way} ({found['trainable'][way]:,})" for way in reversed(WAYS)])
    axes.set_xlabel("test perplexity; in brackets, trained numbers")


def _search(study: Study, laboratory: Laboratory, way: str) -> tuple[list[Experiment], float | None]:
    rates = FULL_RATES if way == FULL else RATES
    return search_rate(rates, lambda rate: _experiment(study, way, rate, study.seeds[0]), laboratory)


def _experiment(study: Study, way: str, rate: float, seed: int) -> Experiment:
    if way == FULL:
        return study.adapted(seed, {**NO_PILLARS, "learning_rate": rate}, f"adapters, {way}, rate {rate:g}")
    options = {**_PEFT, **WAYS[way], "adapter_learning_rate": rate}
    if way != "IA3 everywhere":
        options["adapter_parameters"] = BUDGETS[study.size]
    return study.adapted(seed, options, f"adapters, {way}, rate {rate:g}")
