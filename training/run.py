"""A run from its configuration, new or taken up again, with its folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from training.checkpointing import checkpoints_of, read_progress
from training.config import ARCHITECTURE_KEYS, RESUMABLE_KEYS, TrainingConfig
from training.config_file import load_config
from training.data import SYNTHETIC
from training.records import NoRecords, NoScreen, Records, Screen, require_packages, truncate_metrics
from training.start import continue_from, start_from
from training.team import is_launched, joined, local_rank
from training.trainer import Trainer, TrainingResult
from yunmin.checkpoint import load_checkpoint
from yunmin.errors import CheckpointError, ConfigError
from yunmin.files import atomic_file

CONFIG_FILE = "config.yaml"


def train(config: TrainingConfig) -> TrainingResult:
    """Trains a new run in a new folder below `output_dir`.

    Raises:
        ConfigError: an impossible combination of keys, or the run folder exists.
        YunminError: as data, checkpoint and trainer say.
    """
    require_packages(config)
    device = _device(config)
    # the caller's random state is not ours to change
    with joined(config) as team, torch.random.fork_rng(_cuda(device)):
        name = team.from_first(config.run_name or time.strftime("run-%Y%m%d-%H%M%S"))
        run = Path(config.output_dir) / name
        if team.from_first(run.exists()):
            raise ConfigError(f"run_name: {run} exists; continue it with --resume {run}, or choose another name")
        trainer = Trainer(config, run, start_from(config), device, team)
        if team.is_first:
            run.mkdir(parents=True)
            _write_config(run, config)
        return _run(trainer, Records(run, config) if team.is_first else NoRecords(), done=0)


def resume(source: str | Path, overrides: Sequence[str] = ()) -> TrainingResult:
    """Continues a run from its newest checkpoint.

    Args:
        source: the run folder, or its newest checkpoint.
        overrides: `key=value` of what a run records and how it computes; nothing else may change.

    Raises:
        ConfigError: another key is overridden.
        CheckpointError: the folder is no run, has no checkpoint, or an older one is named.
    """
    run, checkpoint = _find(Path(source))
    for override in overrides:
        key = override.partition("=")[0]
        if key not in RESUMABLE_KEYS:
            raise ConfigError(f"{key}: cannot change when a run is resumed, only {', '.join(RESUMABLE_KEYS)} can")
    config = load_config(run / CONFIG_FILE, list(overrides))
    require_packages(config)
    progress = read_progress(checkpoint)
    device = _device(config)
    with joined(config) as team, torch.random.fork_rng(_cuda(device)):
        trainer = Trainer(config, run, continue_from(config, load_checkpoint(checkpoint)), device, team)
        trainer.resume(checkpoint, progress)
        records: Records = NoRecords()
        if team.is_first:
            truncate_metrics(run, progress.metrics_lines)
            records = Records(run, config, progress.step, progress.wandb_id)
        return _run(trainer, records, done=progress.step)


def resolved(config: TrainingConfig) -> dict[str, Any]:
    """The configuration as `config.yaml` has it: every key that is in force, paths absolute.

    Keys that describe a fresh model are left out where a checkpoint decides them.
    """
    values = config.model_dump(mode="json")
    for key in ("data", "validation_data"):
        values[key] = [_absolute(source) for source in values[key]]
    if config.checkpoint is not None:
        values["checkpoint"] = _absolute(config.checkpoint)
        values = {k: v for k, v in values.items() if k not in ARCHITECTURE_KEYS}
    return values


def to_yaml(config: TrainingConfig) -> str:
    """`resolved` as YAML, which reads back as the same configuration."""
    return yaml.safe_dump(resolved(config), sort_keys=False, allow_unicode=True)


def _run(trainer: Trainer, records: Records, done: int) -> TrainingResult:
    try:
        with Screen(trainer.total_steps, done) if trainer.team.is_first else NoScreen() as screen:
            if not done:
                data, team = trainer.start.data, trainer.team
                screen.line(
                    f"{trainer.run_folder}: {trainer.total_steps} steps of {trainer.config.batch_size} sequences; "
                    f"{len(data.training):,} sequences of {trainer.config.sequence_length} tokens "
                    f"from {data.training_documents:,} documents, {data.validation.numel():,} tokens held out"
                )
                if team.size > 1:
                    kept = "a shard of the weights" if team.is_sharded else "all weights"
                    screen.line(f"{team.size} processes, each with {kept} and its share of every batch")
            return trainer.run(records, screen)
    finally:
        records.close()


def _find(source: Path) -> tuple[Path, Path]:
    run = source.parent if (source / "trainer.json").is_file() else source
    if not (run / CONFIG_FILE).is_file():
        raise CheckpointError(f"{source}: expected a run folder with {CONFIG_FILE}, or a checkpoint in one")
    checkpoints = checkpoints_of(run)
    if not checkpoints:
        raise CheckpointError(f"{run}: there is no checkpoint to resume from; start the run again")
    if run != source and checkpoints[-1].resolve() != source.resolve():
        raise CheckpointError(
            f"{source}: expected the newest checkpoint of the run, which is {checkpoints[-1].name}; "
            f"move the newer ones away to go back"
        )
    return run, checkpoints[-1]


def _device(config: TrainingConfig) -> torch.device:
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and is_launched():
        name = f"cuda:{local_rank()}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device: {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def _cuda(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


def _absolute(source: str) -> str:
    return str(Path(source).resolve()) if source not in (SYNTHETIC, "stdlib") and Path(source).exists() else source


def _write_config(run: Path, config: TrainingConfig) -> None:
    with atomic_file(run / CONFIG_FILE) as aside:
        aside.write_text(to_yaml(config), encoding="utf-8")
