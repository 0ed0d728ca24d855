"""How long a study will take, before it begins: from a few timed steps of a model of its size."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from research.ablation.grid import Setting
from research.ablation.recipes import Recipes
from training.config import TrainingConfig
from yunmin.config import MambaConfig
from yunmin.gated import GatedMixer
from yunmin.model import MambaLM

_STEPS = 3
_ENOUGH_S = 5.0  # for large models: one step and what it took to get there
_GATE_FACTOR = 1.3  # of a step that samples gates, on the share of steps that do
_FORWARD_SHARE = 0.3  # of a step, that a batch costs which is only read
_FIXED_S = 2.0  # of an experiment: reading text, writing, the proofs of an export
_VERIFIED_TOKENS = 2048


@dataclass(frozen=True)
class Estimate:
    """What a study will take.

    Attributes:
        seconds: for everything that is not done yet.
        step_seconds: of one dense step, as timed.
    """

    seconds: float
    step_seconds: float


def estimate(recipes: Recipes, todo: Iterable[Setting], bases: int, workers: int) -> Estimate:
    """Times some dense steps on one thread of this machine, and multiplies.

    Evaluation counts as a share of a step per batch, an export as a constant; where all cores are busy it will take
    longer.

    Args:
        recipes: of the study.
        todo: experiments that are not done.
        bases: how many base models are to be trained first.
        workers: that share the work, one thread each.
    """
    config = recipes.settings.config()
    step = step_seconds(recipes.model, config)
    per_token = step * _FORWARD_SHARE / (config.batch_size * config.sequence_length)
    measured = 2 * recipes.settings.test_tokens + _VERIFIED_TOKENS
    total = 0.0
    for (masking, peft), count in Counter((s.uses("masking"), s.uses("peft")) for s in todo).items():
        gates = config.gate_share if masking else 0.0
        validations = 1 + 2 * masking + peft
        tokens = measured + validations * config.validation_tokens
        total += count * (recipes.steps * step * (1 + gates * (_GATE_FACTOR - 1)) + tokens * per_token + _FIXED_S)
    base = recipes.base(0)
    if base is not None and bases:
        of_base = base.config()
        step_share = of_base.batch_size / config.batch_size
        total += bases * ((of_base.max_steps or 0) * step * step_share + measured * per_token + _FIXED_S)
    return Estimate(total / workers, step)


def step_seconds(model_config: MambaConfig, config: TrainingConfig) -> float:
    """Seconds of a dense training step on one thread: the quickest of a few, after one that compiles."""
    threads = torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    try:
        torch.set_num_threads(1)
        fresh = MambaLM.initialized(model_config, generator)
        model = MambaLM.from_tensors(model_config, fresh.tensors(), GatedMixer).train()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        ids = torch.randint(model_config.n_tokens, (config.batch_size, config.sequence_length + 1), generator=generator)
        times: list[float] = []
        begun = time.perf_counter()
        while len(times) <= _STEPS and (len(times) < 2 or time.perf_counter() - begun < _ENOUGH_S):
            step_begun = time.perf_counter()
            logits = model(ids[:, :-1])  # (B, L, V)
            optimizer.zero_grad()
            F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizer.step()
            times.append(time.perf_counter() - step_begun)
        return min(times[1:])
    finally:
        torch.set_num_threads(threads)
