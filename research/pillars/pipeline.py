"""All three pillars: the full pipeline against dense fine-tuning for as many steps, by what is exported of each."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from export.quantize import quantize_checkpoint
from research.ablation import words
from research.ablation.document import Block, Paragraph, Table
from research.experiments import Experiment, Laboratory
from research.measures import latency, quality
from research.pillars.bases import NO_PILLARS
from research.pillars.study import Study
from research.pillars.summary import TABLE_HEADER, Line, compared, said, table_row
from yunmin.artifact import load_artifact
from yunmin.checkpoint import Checkpoint
from yunmin.cost import cost_of
from yunmin.machine import machine_facts
from yunmin.quantization.layout import Format, Quantization
from yunmin.threads import get_threads

TITLE = "All three"
QUESTION = "What does the full pipeline give, against dense fine-tuning for as many steps?"
KEEPS = True  # whether artifacts are needed to measure further
REFERENCE = "dense, float32"
WAYS: dict[str, dict[str, Any]] = {
    "dense": NO_PILLARS,
    "three pillars": {
        "scan_update_frequency": 40,
        "dense_share": 0.1,
        "gate_share": 0.35,
        "recover_share": 0.4,
        "adapter_share": 0.15,
        "target_sparsity": 0.5,
        "adapter_learning_rate": 3e-3,
        "peft_dropout": 0.0,
    },
}
_STORED: dict[Format, str] = {"none": "float32", "int8": "int8", "int4": "int4"}
_PROMPT_TOKENS, _NEW_TOKENS, _ROUNDS = 256, 64, 7


def experiments(study: Study, _: Laboratory) -> list[Experiment]:
    """Both ways for every seed."""
    return [_experiment(study, way, seed) for seed in study.seeds for way in WAYS]


def collect(study: Study, laboratory: Laboratory) -> dict[str, Any]:
    """What was found.

    Returns:
        By artifact (`WAY, PRECISION`) its test `perplexity` for each seed, `cost` and `timing`; and of each way the
        `trainable` numbers by phase.
    """
    found: dict[str, Any] = {"perplexity": {}, "cost": {}, "trainable": {}}
    for way in WAYS:
        for seed in study.seeds:
            experiment = _experiment(study, way, seed)
            result = laboratory.run(experiment, keep=True)
            found["trainable"][way] = result["trainable_parameters"]
            for stored in _STORED:
                facts = {"what": "stored", "key": result["key"], "by": laboratory.result_file, "as": stored}
                measured = laboratory.remember(facts, partial(_measured, laboratory, experiment, stored))
                name = f"{way}, {_STORED[stored]}"
                found["perplexity"].setdefault(name, []).append(measured["perplexity"])
                found["cost"][name] = measured["cost"]
    keys = [laboratory.key(_experiment(study, way, study.seeds[0])) for way in WAYS]
    timed = {"what": "speed of artifacts", "keys": keys, "threads": get_threads(), "cpu": machine_facts()["cpu"]}
    return {**found, **laboratory.remember(timed, lambda: _timed(study, laboratory))}


def lines(found: Mapping[str, Any]) -> list[Line]:
    """Every artifact against the dense one in float32."""
    return compared(found["perplexity"], REFERENCE)


def blocks(found: Mapping[str, Any]) -> list[Block]:
    """What the comparison says."""
    by_name = {line.name: line for line in lines(found)}
    rows = []
    for name, line in by_name.items():
        cost, timing = found["cost"][name], found["timing"][name]
        rows.append(
            (
                name,
                *table_row(line),
                f"{cost['weight_bytes'] / 2**20:.2f}",
                f"{cost['state_bytes'] / 2**10:.0f}",
                f"{timing['decode_ms']:.3f}",
                f"{timing['prefill_ms']:.2f}",
            )
        )
    sentences = [
        f"{name}: {said(by_name[name], name, REFERENCE)}, with {_ratios(found, name)}"
        for name in ("three pillars, float32", "three pillars, int8")
    ]
    return [
        Paragraph(". ".join(sentences) + "."),
        Table(
            ("artifact", *TABLE_HEADER, "MiB", "state, KiB", "decode, ms", "prefill, ms"),
            rows,
            note=f"Test perplexity; times of one sequence: a token, and a prompt of {_PROMPT_TOKENS} tokens, medians "
            f"of {_ROUNDS} rounds in which all take turns, {words.count(found['threads'], 'thread')}, {found['cpu']}.",
        ),
    ]


def plot(found: Mapping[str, Any], axes: Any) -> None:
    """Perplexity against bytes, one line for each way."""
    for way in WAYS:
        names = [f"{way}, {stored}" for stored in _STORED.values()]
        values = np.array([found["perplexity"][name] for name in names])  # (precisions, seeds)
        sizes = [found["cost"][name]["weight_bytes"] / 2**20 for name in names]
        middle = values.mean(1)
        ends = np.stack([middle - values.min(1), values.max(1) - middle])
        axes.errorbar(sizes, middle, yerr=ends, marker="o", capsize=3, label=way)
        for name, x, y in zip(names, sizes, middle, strict=True):
            axes.annotate(name.rpartition(", ")[2], (x, y), textcoords="offset points", xytext=(5, 5), fontsize="small")
    axes.set_xscale("log")
    axes.set_xlabel("weights, MiB")
    axes.set_ylabel("test perplexity")
    axes.legend()


def _experiment(study: Study, way: str, seed: int) -> Experiment:
    return study.adapted(seed, WAYS[way], f"pipeline, {way}")


def _stored(laboratory: Laboratory, experiment: Experiment, stored: Format) -> Checkpoint:
    checkpoint, _ = load_artifact(laboratory.artifact(experiment))
    if stored == "none":
        return checkpoint
    return quantize_checkpoint(checkpoint, Quantization(stored), None, lambda _: None)


def _measured(laboratory: Laboratory, experiment: Experiment, stored: Format) -> dict[str, Any]:
    checkpoint = _stored(laboratory, experiment, stored)
    cost = cost_of(checkpoint.config, checkpoint.quantization).to_dict()
    return {"perplexity": quality(checkpoint, laboratory.measures)["token_perplexity"], "cost": cost}


def _timed(study: Study, laboratory: Laboratory) -> dict[str, Any]:
    seed = study.seeds[0]
    models = {
        f"{way}, {name}": _stored(laboratory, _experiment(study, way, seed), stored)
        for way in WAYS
        for stored, name in _STORED.items()
    }
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for _ in range(_ROUNDS):
        for name, checkpoint in models.items():
            rounds[name].append(latency(checkpoint, _PROMPT_TOKENS, _NEW_TOKENS, 1))
    timing = {}
    for name, taken in rounds.items():
        timing[name] = {key: statistics.median(one[key] for one in taken) for key in ("prefill_ms", "decode_ms")}
    return {"timing": timing, "threads": get_threads(), "cpu": machine_facts()["cpu"]}


def _ratios(found: Mapping[str, Any], name: str) -> str:
    cost, dense = found["cost"][name], found["cost"][REFERENCE]
    time, dense_time = found["timing"][name], found["timing"][REFERENCE]
    return (
        f"{cost['weight_bytes'] / dense['weight_bytes']:.2f} of the bytes, "
        f"{cost['state_bytes'] / dense['state_bytes']:.2f} of the state, "
        f"{dense_time['decode_ms'] / time['decode_ms']:.2f} times the decode speed and "
        f"{dense_time['prefill_ms'] / time['prefill_ms']:.2f} times the prefill speed"
    )
