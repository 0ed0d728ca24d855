"""A study whose experiments are made up: its machinery without its cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from research.ablation.grid import Grid
from research.ablation.recipes import Recipes
from research.ablation.settings import Settings, default_settings
from research.ablation.sources import prepare_texts
from research.studies.experiments import Experiment, Laboratory, write_result
from tests.research.ablation.studies import made_up
from yunmin.errors import TrainingError

TINY = {
    "d_model": 16,
    "n_layers": 2,
    "vocab_size": 280,
    "sequence_length": 16,
    "batch_size": 2,
    "max_steps": 12,
    "channel_multiple": 8,
    "validation_tokens": 64,
    "peft_dropout": 0.0,
    "scan_objective": "correlation",  # a single int4 group holds all 32 channels, so no order is better for it
}


def write_texts(folder: Path, count: int = 30) -> Path:
    """Documents that differ, one a file."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        lines = [
            f"line {line} of document {number}: {'fox dog cat hen'.split()[(number + line) % 4]}" for line in range(9)
        ]
        (folder / f"{number:02}.txt").write_text("\n".join(lines) + "\n")
    return folder


def tiny_settings(folder: Path, **changes: Any) -> Settings:
    """A study of the smallest models, on the documents of `write_texts`."""
    pilot = default_settings("pilot")
    settings = replace(
        pilot,
        grid=Grid((2,), (0.5,), (0.3, 0.5), (0.4,)),
        seeds=2,
        data=(str(write_texts(folder / "documents")),),
        training=TINY,
        base_training={"max_steps": 4},
        base_documents=3,
        test_tokens=256,
    )
    return replace(settings, **changes)


def tiny_recipes(folder: Path, **changes: Any) -> Recipes:
    settings = tiny_settings(folder, **changes)
    return Recipes(settings, prepare_texts(settings, folder / "texts"))


FAILING: list[str] = []  # made-up experiments fail that have one of these in their label


@pytest.fixture
def made_up_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces experiments by made-up results; the list has the label of each that was done."""
    done: list[str] = []
    FAILING.clear()
    template = made_up(seeds=1, grid={"rank": (4,), "tau": (0.5,), "sparsity": (0.5,), "share": (0.4,)})[0]

    def run(laboratory: Laboratory, experiment: Experiment, *, keep: bool = False) -> dict[str, Any]:
        found = laboratory.result(experiment)
        if found is not None:
            return found
        done.append(experiment.label)
        if any(part in experiment.label for part in FAILING):
            raise TrainingError("the loss\nis nan")
        key = laboratory.key(experiment)
        folder = laboratory.folder / key
        (folder / "artifact").mkdir(parents=True, exist_ok=True)
        perplexity = 20 + int(key, 16) % 100 / 10
        result = {
            **template,
            "key": key,
            "label": experiment.label,
            "test": {**template["test"], "token_perplexity": perplexity},
            "layers": {"channel_sparsity": [0.0, 0.5], "state_sparsity": [0.0, 0.0], "weight_sparsity": None,
                       "allocation": None, "scan_correlation": {"before": [0.1, 0.1], "after": [0.1, 0.1]}},
        }  # fmt: skip
        write_result(folder / laboratory.result_file, result)
        return result

    monkeypatch.setattr(Laboratory, "run", run)
    return done
