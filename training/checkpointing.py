"""Checkpoints of a run: a loadable model, its pillars and adapters, and all that is needed to go on bit for bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from training.adaptive import AdaptiveModel
from training.phases import Phase
from yunmin.checkpoint import write_checkpoint
from yunmin.errors import CheckpointError
from yunmin.files import atomic_folder, write_json, write_safetensors
from yunmin.pillars import save_pillars

TRAINER_FILE = "trainer.json"
OPTIMIZER_FILE = "optimizer.safetensors"
_FORMAT = 1
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: steps done.
        phase: the one the last step belonged to.
        epoch: the data's, of the next step, from 0.
        batch: within that epoch, of the next step, from 0.
        tokens: learned from so far, repeated ones counted again.
        metrics_lines: length of `metrics.jsonl`, so that a resumed run repeats nothing in it.
        validations: held-out perplexity at the end of each phase so far, and at "hard_gates".
        data_sha256: of the data.
        threads: torch's; sums may round otherwise with another number.
        wandb_id: of the run there, or None.
    """

    step: int
    phase: Phase
    epoch: int
    batch: int
    tokens: int
    metrics_lines: int
    validations: dict[str, float]
    data_sha256: str
    threads: int
    wandb_id: str | None = None


def save_checkpoint(
    run: Path,
    progress: Progress,
    adaptive: AdaptiveModel,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    tokenizer_files: dict[str, bytes],
) -> Path:
    """Writes `checkpoint-STEP`, whole or not at all.

    Args:
        run: the run folder.
        progress: what `trainer.json` says.
        adaptive: model and pillars.
        optimizer: of the current phase.
        generator: of the pillars' randomness.
        tokenizer_files: by name.

    Returns:
        The folder.
    """
    target = run / f"checkpoint-{progress.step}"
    with atomic_folder(target, replace=True) as folder:
        write_checkpoint(folder, adaptive.model.config, adaptive.model.tensors())
        for name, content in tokenizer_files.items():
            (folder / name).write_bytes(content)
        save_pillars(folder, adaptive.pillars())
        adaptive.save_adapters(folder)
        random_states = {"rng.torch": torch.get_rng_state(), "rng.pillars": generator.get_state()}
        if torch.cuda.is_available():
            random_states["rng.cuda"] = torch.cuda.get_rng_state()
        write_safetensors(folder / OPTIMIZER_FILE, optimizer_tensors(optimizer) | random_states)
        write_json(folder / TRAINER_FILE, {"format": _FORMAT, **asdict(progress)})
    return target


def read_progress(checkpoint: Path) -> Progress:
    """Reads `trainer.json`.

    Raises:
        CheckpointError: it is missing (the folder is no checkpoint of a run), damaged, or of another format.
    """
    path = checkpoint / TRAINER_FILE
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = raw.pop("format", None)
        if version != _FORMAT:
            raise CheckpointError(f"{path}: expected format {_FORMAT}, found {version!r}")
        return Progress(**raw | {"phase": Phase(raw["phase"])})
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint}: expected a checkpoint of a run, found no {TRAINER_FILE}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state by parameter name: `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME`."""
    return {
        f"{moment}.{name}": optimizer.state[parameter][moment]
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
        if parameter in optimizer.state
        for moment in _MOMENTS
    }


def restore_state(
    checkpoint: Path, optimizer: torch.optim.Optimizer, generator: torch.Generator, device: torch.device
) -> None:
    """Puts the optimizer's moments and all random states back.

    Raises:
        CheckpointError: the file is missing or damaged, or does not fit the parameters.
    """
    path = checkpoint / OPTIMIZER_FILE
    try:
        saved = load_file(path)
        torch.set_rng_state(saved.pop("rng.torch"))
        generator.set_state(saved.pop("rng.pillars"))
        cuda = saved.pop("rng.cuda", None)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: missing or damaged ({error})") from None
    if cuda is not None and device.type == "cuda":
        torch.cuda.set_rng_state(cuda)
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            moments = {moment: saved.pop(f"{moment}.{name}", None) for moment in _MOMENTS}
            found = [t for t in moments.values() if t is not None]
            if not found:
                continue  # a parameter that had no step yet
            if len(found) < len(_MOMENTS) or moments["exp_avg"].shape != parameter.shape:  # type: ignore[union-attr]
                raise CheckpointError(f"{path}: the moments of {name!r} are incomplete or of another shape")
            # the step counter stays on the CPU, where AdamW keeps it
            optimizer.state[parameter] = {
                k: t if k == "step" else t.to(device) for k, t in moments.items() if t is not None
            }
    if saved:
        raise CheckpointError(f"{path}: unexpected tensor {min(saved)!r}")


def prune_checkpoints(run: Path, keep: int) -> None:
    """Removes all but the newest checkpoints of a run."""
    for path in checkpoints_of(run)[:-keep]:
        shutil.rmtree(path)


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    numbered = [(p.name.removeprefix("checkpoint-"), p) for p in run.glob("checkpoint-*")]
    return [path for _, path in sorted((int(number), path) for number, path in numbered if number.isdecimal())]
