"""What a run leaves behind besides weights: metrics.jsonl, TensorBoard, Weights & Biases, and what the screen shows."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch

from training.config import TrainingConfig
from yunmin.errors import CheckpointError, ConfigError, MissingExtraError
from yunmin.files import atomic_file
from yunmin.terminal_bar import TerminalBar

METRICS_FILE = "metrics.jsonl"


def require_packages(config: TrainingConfig) -> None:
    """Looks for optional packages before any work is done.

    Raises:
        MissingExtraError: one that the configuration wants is not installed.
    """
    wanted = {"tensorboard": config.tensorboard, "wandb": config.wandb}
    for package, is_wanted in wanted.items():
        if is_wanted and importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "train", f"{package}=true")


class Records:
    """The trackers of a run.

    Args:
        run: the run folder, which exists.
        config: which trackers are wanted.
        step: steps done before; TensorBoard drops what it has after it.
        wandb_id: of the run to continue there.

    Raises:
        ConfigError: Weights & Biases does not start.
    """

    def __init__(self, run: Path, config: TrainingConfig, step: int = 0, wandb_id: str | None = None) -> None:
        path = run / METRICS_FILE
        self.lines = len(path.read_bytes().splitlines()) if path.is_file() else 0
        self._file = path.open("a", encoding="utf-8")
        self.wandb_id: str | None = None
        self._wandb: Any = None
        self._board: Any = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)
        if config.wandb:
            import wandb

            try:
                self._wandb = wandb.init(
                    project=config.project_name,
                    name=run.name,
                    dir=str(run),
                    id=wandb_id,
                    resume="allow" if wandb_id else None,
                    config=config.model_dump(mode="json"),
                )
            except wandb.Error as error:
                raise ConfigError(f"wandb: {error} (WANDB_MODE=offline needs no account)") from None
            self.wandb_id = self._wandb.id

    def write(self, step: int, kind: str, phase: str, values: Mapping[str, Any]) -> None:
        """Records values after a step.

        Args:
            step: steps done.
            kind: "train", "validation" or "phase".
            phase: the current one.
            values: numbers, or lists of them by layer.
        """
        self._file.write(json.dumps({"step": step, "kind": kind, "phase": phase, **values}) + "\n")
        self._file.flush()
        self.lines += 1
        numbers = dict(_flattened(values))
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{name}": value for name, value in numbers.items()}, step=step)

    def close(self) -> None:
        """Flushes and closes all trackers."""
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def truncate_metrics(run: Path, lines: int) -> None:
    """Cuts `metrics.jsonl` to what it had when a checkpoint was written, so that no step appears twice.

    Raises:
        CheckpointError: it is shorter than that.
    """
    path = run / METRICS_FILE
    kept = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    if len(kept) < lines:
        raise CheckpointError(f"{path}: expected at least {lines} lines, found {len(kept)}")
    with atomic_file(path) as aside:
        aside.write_text("".join(kept[:lines]), encoding="utf-8")


class NoRecords(Records):
    """What processes other than a team's first write: nothing."""

    def __init__(self) -> None:
        self.lines = 0
        self.wandb_id = None

    def write(self, step: int, kind: str, phase: str, values: Mapping[str, Any]) -> None:
        """Writes nothing."""

    def close(self) -> None:
        """Has nothing to close."""


class Screen(TerminalBar):
    """What a run shows: lines of its log, and on a terminal a bar.

    Args:
        total: steps of the run.
        done: steps done before.
        stream: where to write; None for stderr.
    """

    def __init__(self, total: int, done: int = 0, stream: TextIO | None = None) -> None:
        super().__init__(
            "{task.fields[phase]:<8}",
            "loss {task.fields[loss]:.4f}  {task.fields[rate]:,.0f} tokens/s ",
            shows_time_left=True,
            stream=stream,
            total=total,
            completed=done,
            phase="",
            loss=float("nan"),
            rate=0.0,
        )

    def advance(self, step: int, phase: str, loss: float, rate: float) -> None:
        """Moves the bar, where there is one."""
        self.update(completed=step, phase=phase, loss=loss, rate=rate)


class NoScreen(Screen):
    """What processes other than a team's first show: nothing."""

    def __init__(self) -> None:
        self._bar = None

    def line(self, text: str) -> None:
        """Shows nothing."""


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory used so far: of the device where it is CUDA, else resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def duration(seconds: float) -> str:
    """h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _flattened(values: Mapping[str, Any]) -> list[tuple[str, float]]:
    flat: list[tuple[str, float]] = []
    for name, value in values.items():
        parts = (
            [(f"{name}/{layer}", v) for layer, v in enumerate(value)] if isinstance(value, list) else [(name, value)]
        )
        flat += [(part, float(v)) for part, v in parts if isinstance(v, int | float)]
    return flat


def described(statistics: Mapping[str, Any]) -> str:
    """Statistics in one line: numbers as they are, lists by layer."""

    def shown(value: float | list[float]) -> str:
        return f"[{' '.join(f'{v:.3f}' for v in value)}]" if isinstance(value, list) else f"{value:.3f}"

    return ", ".join(f"{name.replace('_', ' ')} {shown(value)}" for name, value in statistics.items())
