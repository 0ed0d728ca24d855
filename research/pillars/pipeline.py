"""All three pillars: the full pipeline against dense fine-tuning for as many steps, by what is exported of each."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from research.pillars.rates import search_rate, sweep
from research.pillars.study import Study
from research.pillars.summary import TABLE_HEADER, Line, compared, said, table_row
from research.reports import words
from research.reports.document import Block, Bullets, Table
from research.studies.experiments import NO_PILLARS, Experiment, Laboratory
from research.studies.measures import latency, quality, quantized
from yunmin.artifact import load_artifact
from yunmin.checkpoint import Checkpoint
from yunmin.cost import cost_of
from yunmin.machine import machine_facts
from yunmin.quantization.layout import Format
from yunmin.threads import get_threads

TITLE = "All three"
QUESTION = "What does the full pipeline give, against dense fine-tuning for as many steps?"
KEEPS = True  # whether artifacts are needed to measure further
ADAPTS = True  # whether anything is trained after the base models
REFERENCE = "dense"
RATES = (1e-3, 3e-3)
_PILLARS: dict[str, Any] = {
    "scan_update_frequency": 40,
    "dense_share": 0.1,
    "gate_share": 0.35,
    "recover_share": 0.4,
    "adapter_share": 0.15,
    "target_state_sparsity": 0.5,
    "adapter_learning_rate": 3e-3,
    "peft_dropout": 0.0,
}
WAYS: dict[str, Mapping[str, Any]] = {
    "dense": NO_PILLARS,
    "three pillars, 25 % cut": {**_PILLARS, "target_sparsity": 0.25},
    "three pillars, 50 % cut": {**_PILLARS, "target_sparsity": 0.5},
}
_STORED: dict[Format, str] = {"none": "float32", "int8": "int8", "int4": "int4"}
_PROMPT_TOKENS, _NEW_TOKENS, _ROUNDS = 256, 64, 7


def experiments(study: Study, laboratory: Laboratory) -> list[Experiment]:
    """Rates of every way with the first seed; the other seeds at the best one, once it is known."""
    return sweep(WAYS, study.seeds, partial(_search, study, laboratory), partial(_experiment, study))


def collect(study: Study, laboratory: Laboratory) -> dict[str, Any]:
    """What was found.

    Returns:
        By precision and way the test `perplexity` for each seed and the `cost`, by artifact (`WAY, PRECISION`) its
        `timing`; and of each way the best `rate` and the `trainable` numbers by phase.
    """
    found: dict[str, Any] = {"perplexity": {}, "cost": {}, "trainable": {}, "rate": {}}
    for way in WAYS:
        _, rate = _search(study, laboratory, way)
        assert rate is not None
        found["rate"][way] = rate
        for seed in study.seeds:
            experiment = _experiment(study, way, rate, seed)
            result = laboratory.run(experiment, keep=True)
            found["trainable"][way] = result["trainable_parameters"]
            for stored, precision in _STORED.items():
                facts = {"what": "stored", "key": result["key"], "by": laboratory.result_file, "as": stored}
                measured = laboratory.remember(facts, partial(_measured, laboratory, experiment, stored))
                found["perplexity"].setdefault(precision, {}).setdefault(way, []).append(measured["perplexity"])
                found["cost"].setdefault(precision, {})[way] = measured["cost"]
    timed = [_experiment(study, way, found["rate"][way], study.seeds[0]) for way in WAYS]
    keys = [laboratory.key(experiment) for experiment in timed]
    facts = {"what": "speed of artifacts", "keys": keys, "threads": get_threads(), "cpu": machine_facts()["cpu"]}
    return {**found, **laboratory.remember(facts, partial(_timed, laboratory, timed))}


def lines(found: Mapping[str, Any]) -> dict[str, list[Line]]:
    """By precision, the full pipeline against dense fine-tuning."""
    return compared(found["perplexity"], REFERENCE)


def blocks(found: Mapping[str, Any]) -> list[Block]:
    """What the comparison says."""
    rows, sentences = [], []
    for precision, of_precision in lines(found).items():
        for line in of_precision:
            cost, timing = found["cost"][precision][line.name], found["timing"][f"{line.name}, {precision}"]
            sizes = (f"{cost['weight_bytes'] / 2**20:.2f}", f"{cost['state_bytes'] / 2**10:.0f}")
            times = (f"{timing['decode_ms']:.3f}", f"{timing['prefill_ms']:.2f}")
            rows.append((precision, line.name, *table_row(line), *sizes, *times))
            if line.name != REFERENCE:
                clause = said(line, line.name, "dense fine-tuning")
                sentences.append(f"{precision}: {clause}, with {_ratios(found, precision, line.name)}")
    return [
        Bullets([f"{sentence}." for sentence in sentences]),
        Table(
            ("stored as", "way", *TABLE_HEADER, "MiB", "state, KiB", "decode, ms", "prefill, ms"),
            rows,
            labels=2,
            note=f"{_training(found)} Test perplexity; times of one sequence: a token, and a prompt of "
            f"{_PROMPT_TOKENS} tokens, medians of {_ROUNDS} rounds in which all take turns, "
            f"{words.count(found['threads'], 'thread')}, {found['cpu']}.",
        ),
    ]


def _training(found: Mapping[str, Any]) -> str:
    """Learning rates, and what is trained by phase."""
    told = []
    for way in WAYS:
        phases = [f"{count:,} ({phase})" for phase, count in found["trainable"][way].items()]
        told.append(f"{way}, learning rate {found['rate'][way]:g}: {words.listed(phases)}")
    return f"Trained numbers by phase: {'; '.join(told)}."


def plot(found: Mapping[str, Any], axes: Any) -> None:
    """Perplexity against bytes, one line for each way; the ends of bars are the extreme seeds."""
    for way in WAYS:
        values = np.array([by_way[way] for by_way in found["perplexity"].values()])  # (precisions, seeds)
        sizes = [by_way[way]["weight_bytes"] / 2**20 for by_way in found["cost"].values()]
        middle = values.mean(1)
        ends = np.stack([middle - values.min(1), values.max(1) - middle])
        axes.errorbar(sizes, middle, yerr=ends, marker="o", capsize=3, label=way)
        for precision, x, y in zip(found["perplexity"], sizes, middle, strict=True):
            axes.annotate(precision, (x, y), textcoords="offset points", xytext=(5, 5), fontsize="small")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("weights, MiB")
    axes.set_ylabel("test perplexity")
    axes.legend()


def _search(study: Study, laboratory: Laboratory, way: str) -> tuple[list[Experiment], float | None]:
    return search_rate(RATES, lambda rate: _experiment(study, way, rate, study.seeds[0]), laboratory)


def _experiment(study: Study, way: str, rate: float, seed: int) -> Experiment:
    return study.adapted(seed, {**WAYS[way], "learning_rate": rate}, f"pipeline, {way}, rate {rate:g}")


def _stored(laboratory: Laboratory, experiment: Experiment, stored: Format) -> Checkpoint:
    checkpoint, _ = load_artifact(laboratory.artifact(experiment))
    if stored == "none":
        return checkpoint
    return quantized(checkpoint, stored)


def _measured(laboratory: Laboratory, experiment: Experiment, stored: Format) -> dict[str, Any]:
    checkpoint = _stored(laboratory, experiment, stored)
    cost = cost_of(checkpoint.config, checkpoint.quantization).to_dict()
    return {"perplexity": quality(checkpoint, laboratory.measures)["token_perplexity"], "cost": cost}


def _timed(laboratory: Laboratory, experiments: Sequence[Experiment]) -> dict[str, Any]:
    models = {
        f"{way}, {precision}": _stored(laboratory, experiment, stored)
        for way, experiment in zip(WAYS, experiments, strict=True)
        for stored, precision in _STORED.items()
    }
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for _ in range(_ROUNDS):
        for name, checkpoint in models.items():
            rounds[name].append(latency(checkpoint, _PROMPT_TOKENS, _NEW_TOKENS, 1))
    timing = {}
    for name, taken in rounds.items():
        timing[name] = {key: statistics.median(one[key] for one in taken) for key in ("prefill_ms", "decode_ms")}
    return {"timing": timing, "threads": get_threads(), "cpu": machine_facts()["cpu"]}


def _ratios(found: Mapping[str, Any], precision: str, way: str) -> str:
    cost, dense = (found["cost"][precision][name] for name in (way, REFERENCE))
    time, dense_time = (found["timing"][f"{name}, {precision}"] for name in (way, REFERENCE))
    return (
        f"{cost['weight_bytes'] / dense['weight_bytes']:.2f} of the bytes, "
        f"{cost['state_bytes'] / dense['state_bytes']:.2f} of the state, "
        f"{dense_time['decode_ms'] / time['decode_ms']:.2f} times the decode speed and "
        f"{dense_time['prefill_ms'] / time['prefill_ms']:.2f} times the prefill speed"
    )
