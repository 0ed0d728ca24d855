"""What a study is asked for: its size by mode, its grid, its data, and the training options of all its experiments."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from research.ablation.grid import Grid
from training.config import RECORD_KEYS, TrainingConfig
from training.config_file import parse_config
from yunmin.errors import ConfigError
from yunmin.files import atomic_file, write_json

SETTINGS_FILE = "settings.json"
MODES = ("pilot", "quick_research", "research")
DEFAULT_POINT = Grid(rank=(8,), tau=(0.5,), sparsity=(0.5,), share=(0.4,))  # without a grid search

# what is meant to differ between experiments cannot be set for all of them
_DECIDED = {
    **dict.fromkeys(("seed", "num_epochs", "checkpoint"), "an option of its own"),
    **dict.fromkeys(("data", "validation_data", "validation_share"), "--data"),
    **dict.fromkeys(("enable_masking", "enable_peft"), "the combination of pillars"),
    **dict.fromkeys(("peft_r", "masking_tau", "target_sparsity", "lora_share", "ia3_share"), "the grid"),
    **dict.fromkeys(("run_name", "output_dir", "project_name", *RECORD_KEYS), "the study"),
}


@dataclass(frozen=True)
class Settings:
    """A study; all that its results depend on, besides the contents of its texts.

    Attributes:
        mode: one of `MODES`, which gave what was not asked for.
        grid: the values of each grid key.
        seeds: how many, from 0.
        epochs: passes over the task's text, in every experiment.
        data: sources of the task's text; empty takes the documentation in the running Python's library.
        checkpoint: where all experiments start; None trains a base model for each seed on the library's sources.
        training: keys of `TrainingConfig` for all experiments.
        base_training: those of the base models.
        base_documents: at most so many are read for the base models.
        test_tokens: of the test text at most, which are scored.
        project: name in the trackers and in the report.
        trials: of the search, where there is one; None runs the whole grid.
    """

    mode: str
    grid: Grid
    seeds: int
    epochs: int
    data: tuple[str, ...] = ()
    checkpoint: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    base_training: Mapping[str, Any] = field(default_factory=dict)
    base_documents: int = 100
    test_tokens: int = 16384
    project: str = "yunmin-ablation"
    trials: int | None = None

    def config(self, **more: Any) -> TrainingConfig:
        """The training options that all experiments share, and `more`, validated."""
        return parse_config({**self.training, **more}, where="--set")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads a study's settings.

        Raises:
            ConfigError: there are none, or they are damaged.
        """
        path = folder / SETTINGS_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            grid = Grid(**{key: tuple(chosen) for key, chosen in values.pop("grid").items()})
            return cls(grid=grid, data=tuple(values.pop("data")), **values)
        except FileNotFoundError:
            raise ConfigError(f"{folder}: expected the folder of a study, found no {SETTINGS_FILE}") from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{path}: expected a study's settings, {error}") from None

    def write(self, folder: Path) -> None:
        """Writes them beside the study's results."""
        with atomic_file(folder / SETTINGS_FILE) as aside:
            write_json(aside, asdict(self))


def default_settings(mode: str) -> Settings:
    """What a mode stands for: a pilot takes minutes, quick research an hour or so, research a day or a cluster."""
    return {"pilot": _PILOT, "quick_research": _QUICK_RESEARCH, "research": _RESEARCH}[mode]


def with_keys(settings: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Training options with `key=value` overrides.

    Raises:
        ConfigError: an unknown key, an impossible value, or a key that the study decides itself.
    """
    import yaml

    values = dict(settings)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(f"--set {override}: expected key=value")
        if key in _DECIDED:
            raise ConfigError(f"--set {key}: {_DECIDED[key]} decides it")
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set {key}: {text!r} is no YAML value") from None
    parse_config(values, where="--set")
    return values


_PILOT = Settings(
    mode="pilot",
    grid=Grid(rank=(4, 16), tau=(0.5,), sparsity=(0.3, 0.5), share=(0.4,)),
    seeds=5,
    epochs=1,
    training={
        "d_model": 48,
        "n_layers": 4,
        "vocab_size": 512,
        "sequence_length": 128,
        "batch_size": 8,
        "max_documents": 32,
        "learning_rate": 8e-3,
        "adapter_learning_rate": 2e-2,
        "peft_dropout": 0.0,
        "channel_multiple": 8,
        "validation_tokens": 4096,
    },
    base_training={"max_steps": 300, "learning_rate": 4e-3},
    base_documents=80,
    test_tokens=8192,
)
_QUICK_RESEARCH = Settings(
    mode="quick_research",
    grid=Grid(rank=(4, 16), tau=(0.5,), sparsity=(0.3, 0.5, 0.7), share=(0.2, 0.6)),
    seeds=3,
    epochs=2,
    training={
        **_PILOT.training,
        "d_model": 128,
        "vocab_size": 1000,
        "max_documents": None,
        "channel_multiple": 16,
        "learning_rate": 4e-3,
        "adapter_learning_rate": 1e-2,
        "validation_tokens": 8192,
    },
    base_training={"max_steps": 1500, "learning_rate": 2e-3},
    base_documents=400,
)
_RESEARCH = Settings(
    mode="research",
    grid=Grid(rank=(4, 8, 16), tau=(0.3, 0.5, 0.8), sparsity=(0.3, 0.5, 0.7), share=(0.2, 0.3, 0.4, 0.6)),
    seeds=3,
    epochs=3,
    training={
        **_QUICK_RESEARCH.training,
        "d_model": 256,
        "vocab_size": 2000,
        "sequence_length": 256,
        "batch_size": 4,
        "learning_rate": 2e-3,
    },
    base_training={"max_steps": 3000, "learning_rate": 2e-3, "batch_size": 8},
    base_documents=1000,
)
