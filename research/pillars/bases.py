"""The models that comparisons start from: trained here, on real text, one for each seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research.studies.experiments import NO_PILLARS, Experiment
from research.studies.texts import Split

SIZES: dict[str, dict[str, Any]] = {
    # for tests and to see that a comparison runs
    "tiny": {"d_model": 64, "n_layers": 2, "vocab_size": 400},
    "2m": {"d_model": 256, "n_layers": 4, "vocab_size": 1000},
    "10m": {"d_model": 512, "n_layers": 6, "vocab_size": 1000},
}
WINDOW = 256
_COMMON: dict[str, Any] = {
    "sequence_length": WINDOW,
    "matmul_precision": "bfloat16",
    "validation_tokens": 16384,
    "log_interval": 20,
}


@dataclass(frozen=True)
class Budget:
    """How long everything trains.

    Attributes:
        base_steps: of a base model, with batches of `base_batch` sequences.
        steps: of whatever starts from one, with batches of `batch`.
    """

    base_steps: int = 600
    base_batch: int = 16
    steps: int = 300
    batch: int = 8


def base_model(size: str, seed: int, text: Split, budget: Budget) -> Experiment:
    """A dense model from scratch."""
    training = {
        **SIZES[size],
        **NO_PILLARS,
        **_texts(text),
        **_COMMON,
        "seed": seed,
        "max_steps": budget.base_steps,
        "batch_size": budget.base_batch,
        "learning_rate": 3e-3,
    }
    return Experiment(training, label=f"base {size}, seed {seed}")


def adapted(base: Experiment, text: Split, budget: Budget, options: Mapping[str, Any], label: str) -> Experiment:
    """What starts from a base model, with the base's seed."""
    seed = base.training["seed"]
    own = {"seed": seed, "max_steps": budget.steps, "batch_size": budget.batch, "learning_rate": 1e-3}
    return Experiment({**_texts(text), **_COMMON, **own, **options}, start=base, label=f"{label}, seed {seed}")


def _texts(text: Split) -> dict[str, Any]:
    paths: dict[str, Path] = {"data": text.train, "validation_data": text.tune}
    return {key: str(path) for key, path in paths.items()}
