"""Checkpoints of a run: a loadable model, its pillars and adapters, and all that is needed to go on bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from training.adaptive import AdaptiveModel
from training.optimization import MOMENTS, moments_of
from training.parallel import whole
from training.phases import Phase
from yunmin.checkpoint import write_checkpoint
from yunmin.errors import CheckpointError
from yunmin.files import atomic_folder, write_json, write_safetensors
from yunmin.pillars import save_pillars

TRAINER_FILE = "trainer.json"
OPTIMIZER_FILE = "optimizer.safetensors"
_FORMAT = 3


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

    A team's processes must call this together, since each may hold a shard; the first one writes.

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
    tensors = {name: whole(tensor) for name, tensor in adaptive.model.tensors().items()}
    adapters, moments = adaptive.adapters(), moments_of(optimizer)
    if not adaptive.team.is_first:
        return target
    with atomic_folder(target, replace=True) as folder:
        write_checkpoint(folder, adaptive.model.config, tensors)
        for name, content in tokenizer_files.items():
            (folder / name).write_bytes(content)
        save_pillars(folder, adaptive.pillars())
        adapters.save(folder / "adapters")
        random_states = {"rng.torch": torch.get_rng_state(), "rng.pillars": generator.get_state()}
        if torch.cuda.is_available():
            random_states["rng.cuda"] = torch.cuda.get_rng_state()
        write_safetensors(folder / OPTIMIZER_FILE, moments | random_states)
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


def read_state(
    checkpoint: Path, parameters: Mapping[str, Tensor], generator: torch.Generator, device: torch.device
) -> dict[str, Tensor]:
    """Puts all random states back, and returns the optimizer's moments, as `moments_of` gives them.

    Args:
        checkpoint: of the run.
        parameters: that the optimizer trains, by name.
        generator: of the pillars' randomness.
        device: that is trained on.

    Raises:
        CheckpointError: the file is missing or damaged, or does not fit the parameters.
    """
    path = checkpoint / OPTIMIZER_FILE
    try:
        moments = load_file(path)
        torch.set_rng_state(moments.pop("rng.torch"))
        generator.set_state(moments.pop("rng.pillars"))
        cuda = moments.pop("rng.cuda", None)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: missing or damaged ({error})") from None
    if cuda is not None and device.type == "cuda":
        torch.cuda.set_rng_state(cuda)
    expected = {f"{moment}.{name}" for name in parameters for moment in MOMENTS}
    if unexpected := sorted(set(moments) - expected):
        raise CheckpointError(f"{path}: unexpected tensor {unexpected[0]!r}")
    for name, parameter in parameters.items():
        found = [moments[f"{moment}.{name}"] for moment in MOMENTS if f"{moment}.{name}" in moments]
        if found and (len(found) < len(MOMENTS) or found[-1].shape != parameter.shape):
            raise CheckpointError(f"{path}: the moments of {name!r} are incomplete or of another shape")
    return moments


def prune_checkpoints(run: Path, keep: int) -> None:
    """Removes all but the newest checkpoints of a run."""
    for path in checkpoints_of(run)[:-keep]:
        shutil.rmtree(path)


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    numbered = [(p.name.removeprefix("checkpoint-"), p) for p in run.glob("checkpoint-*")]
    return [path for _, path in sorted((int(number), path) for number, path in numbered if number.isdecimal())]
