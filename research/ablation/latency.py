"""How fast the models of a study are: each shape once, when nothing else computes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from research.studies.experiments import Laboratory
from research.studies.measures import latency
from yunmin.checkpoint import Checkpoint
from yunmin.config import MambaConfig
from yunmin.machine import machine_facts
from yunmin.model import MambaLM
from yunmin.threads import get_threads

_PROMPT_TOKENS, _NEW_TOKENS = 256, 32
_ROUNDS, _REPEATS = 5, 3


def shape_of(result: Mapping[str, Any], model: MambaConfig) -> MambaConfig:
    """The architecture of an experiment's artifact, from the shares that were cut of the model it started from."""
    layers = result["layers"]
    return replace(
        model,
        d_inner=tuple(round(d * (1 - cut)) for d, cut in zip(model.d_inner, layers["channel_sparsity"], strict=True)),
        d_state=tuple(round(n * (1 - cut)) for n, cut in zip(model.d_state, layers["state_sparsity"], strict=True)),
    )


def latencies(
    results: Iterable[Mapping[str, Any]], model: MambaConfig, laboratory: Laboratory, report: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Times every different shape, with random weights: a kernel takes as long whatever the numbers are.

    Shapes are timed in turns, so that what slows the machine down for a while slows all of them.

    Args:
        results: of finished experiments.
        model: what they started from.
        laboratory: remembers what was timed on this machine.
        report: told what is timed.

    Returns:
        For each experiment's key `prefill_ms` and `decode_ms`, medians over all turns, and what they rest on.
    """
    shapes = {result["key"]: shape_of(result, model) for result in results}
    distinct = sorted(set(shapes.values()), key=lambda shape: (shape.d_inner, shape.d_state))
    machine = {key: machine_facts()[key] for key in ("cpu", "cores_usable", "torch")}
    facts = {"latency": [asdict(shape) for shape in distinct], **machine, "threads": get_threads(), "rounds": _ROUNDS}

    def measure() -> dict[str, Any]:
        report(f"timing {len(distinct)} shapes of model, {get_threads()} threads")
        return {"shapes": _timed(distinct)}

    found = dict(zip(distinct, laboratory.remember(facts, measure)["shapes"], strict=True))
    return {key: found[shape] for key, shape in shapes.items()}


def _timed(shapes: Sequence[MambaConfig]) -> list[dict[str, Any]]:
    checkpoints = [_random_model(shape) for shape in shapes]
    turns: list[list[dict[str, float]]] = [[] for _ in shapes]
    for _ in range(_ROUNDS):
        for checkpoint, own in zip(checkpoints, turns, strict=True):
            own.append(latency(checkpoint, _PROMPT_TOKENS, _NEW_TOKENS, _REPEATS))
    return [_median(own) for own in turns]


def _random_model(shape: MambaConfig) -> Checkpoint:
    model = MambaLM.initialized(shape, torch.Generator().manual_seed(0))
    return Checkpoint(shape, model.tensors(), None, Path("random"))


def _median(turns: list[dict[str, float]]) -> dict[str, Any]:
    names = ("prefill_ms", "decode_ms")
    medians: dict[str, Any] = {name: statistics.median(turn[name] for turn in turns) for name in names}
    counts = {"prompt_tokens": _PROMPT_TOKENS, "new_tokens": _NEW_TOKENS, "repeats": _ROUNDS * _REPEATS}
    return {**medians, **counts}
