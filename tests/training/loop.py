"""A training loop of the least kind, for tests that look into it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from tests.models import random_ids, random_model, small_config
from training.adaptive import AdaptiveModel
from training.config import TrainingConfig
from training.config_file import parse_config
from training.optimization import parameter_groups
from training.phases import Phase
from yunmin.checkpoint import write_checkpoint
from yunmin.gated import GatedMixer
from yunmin.pillars import save_pillars


def small_run(**options: Any) -> TrainingConfig:
    values: dict[str, Any] = {"channel_multiple": 8, "gate_block_size": 8, "scan_update_frequency": 3}
    values |= {"importance": "gradient", "lora_init": "random"}
    values |= {"target_state_sparsity": 0.5, "state_ranking": "learned", "learning_rate": 3e-3, "peft_dropout": 0.0}
    return parse_config(values | options)


class Run:
    """A training loop of the least kind: one batch, all phases."""

    def __init__(self, config: TrainingConfig, seed: int = 0) -> None:
        self.config = config
        self.model = random_model(small_config(), mixer=GatedMixer)
        self.adaptive = AdaptiveModel(self.model, config, torch.Generator().manual_seed(seed))
        self.ids = random_ids(self.model.config, 4, 17)
        self.lines: list[str] = []

    def phase(self, phase: Phase, steps: int = 12) -> None:
        self.lines += self.adaptive.enter(phase, ([self.loss()] for _ in itertools.count()))
        self.steps(steps)

    def steps(self, steps: int) -> None:
        groups = [
            {k: v for k, v in g.items() if k != "param_names"}
            for g in parameter_groups(self.model, self.adaptive.phase, self.config)
        ]
        optimizer = torch.optim.AdamW(groups)
        self.model.train()
        for step in range(steps):
            self.adaptive.before_step(step / (steps - 1))
            loss = self.loss() + self.adaptive.penalty()
            optimizer.zero_grad()
            loss.backward()
            self.adaptive.after_backward()
            optimizer.step()
            self.lines += self.adaptive.after_step()

    def loss(self) -> torch.Tensor:
        logits = self.model(self.ids[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), self.ids[:, 1:].flatten())

    def logits(self) -> torch.Tensor:
        with self.adaptive.evaluation(), torch.no_grad():
            return self.model(self.ids)

    def write(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        write_checkpoint(folder, self.model.config, self.model.tensors())
        save_pillars(folder, self.adaptive.pillars())
        self.adaptive.adapters().save(folder / "adapters")
