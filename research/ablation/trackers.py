"""TensorBoard and Weights & Biases: every experiment of a study with its settings and what was measured."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from research.ablation.outcome import GRID_KEYS, has_pillar, name_of
from yunmin.errors import ConfigError, MissingExtraError

_TOLD_FILE = "tracked.txt"  # which experiments a tracker knows, so that a study taken up again tells no one twice


class Trackers:
    """Tells trackers about finished experiments, each of them once.

    Args:
        folder: of the study.
        project: name in Weights & Biases, where the study's folder names the group.
        tensorboard, wandb: which are wanted.

    Raises:
        MissingExtraError: a tracker is wanted and its package is missing.
    """

    def __init__(self, folder: Path, project: str, *, tensorboard: bool, wandb: bool) -> None:
        self._folder, self._project = folder, project
        self._wanted = [n for n, wanted in (("tensorboard", tensorboard), ("wandb", wandb)) if wanted]
        for package in self._wanted:
            if importlib.util.find_spec(package) is None:
                raise MissingExtraError(package, "train", f"--{package}")
        path = folder / _TOLD_FILE
        self._told = set(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else set()

    def tell(self, result: Mapping[str, Any]) -> None:
        """Hands an experiment's result on, unless it failed.

        Raises:
            ConfigError: Weights & Biases does not start.
        """
        for name in self._wanted:
            line = f"{name} {result['combination']} {result['key']}"
            if "error" in result or line in self._told:
                continue
            getattr(self, f"_{name}")(result)
            self._told.add(line)
            with (self._folder / _TOLD_FILE).open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")

    def _tensorboard(self, result: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        measures = measures_of(result)
        with SummaryWriter(str(self._folder / "tensorboard" / run_name(result))) as writer:
            for summary in hparams(settings_of(result), measures):  # `add_hparams` would make a folder in the folder
                writer.file_writer.add_summary(summary)
            for name, value in measures.items():
                writer.add_scalar(name, value)

    def _wandb(self, result: Mapping[str, Any]) -> None:
        import wandb

        try:
            run = wandb.init(
                project=self._project,
                group=self._folder.name,
                name=run_name(result),
                dir=str(self._folder),
                config={**settings_of(result), "training": result["training"]},
                reinit="finish_previous",
            )
        except wandb.Error as error:
            raise ConfigError(f"wandb: {error} (WANDB_MODE=offline needs no account)") from None
        run.log(measures_of(result))
        run.finish()


def run_name(result: Mapping[str, Any]) -> str:
    """The experiment's name in trackers, of which TensorBoard makes a folder."""
    name = f"{name_of(result['combination'], result['point'])} seed {result['seed']}"
    return "".join(c if c.isalnum() or c in ".+-" else "-" for c in name).replace("--", "-")


def settings_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the experiment is: its pillars, its point of the grid, its seed."""
    pillars = {pillar: has_pillar(result["combination"], pillar) for pillar in ("scan", "masking", "peft")}
    point = {key: float(result["point"][key]) for key in GRID_KEYS if key in result["point"]}
    return {"combination": result["combination"], **pillars, **point, "seed": result["seed"]}


def measures_of(result: Mapping[str, Any]) -> dict[str, float]:
    """What was measured, as numbers by name."""
    found = {
        "test/perplexity": result["test"]["token_perplexity"],
        "test/bits_per_byte": result["test"]["bits_per_byte"],
        "test/perplexity_int4": (result.get("int4") or {}).get("token_perplexity"),
        "training/adapted_parameters": result["adapted_parameters"],
        "training/memory_bytes": result["training_memory_bytes"],
        "training/seconds": result["seconds"]["train"],
    }
    found |= {f"cost/{key}": value for key, value in result["cost"].items()}
    found |= {f"validation/{key}": value for key, value in result["validation_perplexity"].items()}
    return {name: float(value) for name, value in found.items() if value is not None}
