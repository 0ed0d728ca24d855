"""Small runs in which every pillar is at work, and how to stop one at a given step."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from training.config import TrainingConfig
from training.config_file import parse_config
from training.cut import exact_masks
from training.gating import Gating
from training.ranking import Ranking
from training.records import Screen

SMALL: dict[str, Any] = {
    "run_name": "run",
    "device": "cpu",
    "d_model": 16,
    "n_layers": 2,
    "vocab_size": 40,
    "d_state": 4,
    "max_documents": 60,
    "sequence_length": 24,
    "validation_tokens": 120,
    "batch_size": 3,
    "max_steps": 24,
    "learning_rate": 3e-3,
    "dense_share": 0.25,
    "gate_share": 0.25,
    "recover_share": 0.25,
    "adapter_share": 0.25,
    "scan_start": "random",
    "scan_update_frequency": 4,
    "scan_objective": "correlation",
    "scan_gradient_weighted": True,
    "target_state_sparsity": 0.5,
    "state_ranking": "learned",
    "channel_gates": "block",
    "gate_block_size": 8,
    "channel_multiple": 8,
    "weight_mask": "n:m",
    "importance": "gradient",
    "lora_init": "random",
    "peft_r": 3,
    "log_interval": 2,
    "keep_checkpoints": 20,
    "tensorboard": False,
}


def small_run(output_dir: Path, **options: Any) -> TrainingConfig:
    """All pillars, 24 steps, six to a phase."""
    return parse_config(SMALL | {"output_dir": str(output_dir)} | options)


def interrupt_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends this process SIGINT while a run does its given step."""
    advance = Screen.advance

    def advance_and_interrupt(screen: Screen, done: int, phase: str, loss: float, rate: float) -> None:
        advance(screen, done, phase, loss, rate)
        if done == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Screen, "advance", advance_and_interrupt)


def frozen(
    gating: Gating | Ranking, scan_order: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], dict[str, Tensor]]:
    """Channel gates, state gates and weight masks as the gate phase ends with them."""
    if isinstance(gating, Gating):
        channels, states = gating.choose()
    else:
        channels, states = gating.choose_channels(scan_order), gating.choose_states()
    model, config = gating.model.config, gating.config
    return channels, states, exact_masks(model, config, gating.mask_scores(), channels, states, scan_order)
