"""The optimizer of a phase: its groups, the moments it takes over, and how gradients are clipped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from training.config import TrainingConfig
from training.parallel import shared_out, whole
from training.phases import Phase
from yunmin.errors import TrainingError
from yunmin.model import MambaLM

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_NO_DECAY = ("A_log", ".D", "bias", "norm.weight", "norm_f.weight")


def parameter_groups(model: MambaLM, phase: Phase, config: TrainingConfig) -> list[dict[str, Any]]:
    """Parameter groups of a phase for AdamW; gates keep a constant rate (`scheduled` is False)."""
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if phase is Phase.ADAPTERS:
        rate = config.adapter_learning_rate or config.learning_rate
        return [_group("adapters", trainable, rate, 0.0)]
    gates = {n: p for n, p in trainable.items() if n.endswith(".logits")}
    plain = {n: p for n, p in trainable.items() if n not in gates and n.endswith(_NO_DECAY)}
    decayed = {n: p for n, p in trainable.items() if n not in gates and n not in plain}
    groups = [
        _group("decayed", decayed, config.learning_rate, config.weight_decay),
        _group("plain", plain, config.learning_rate, 0.0),
    ]
    if gates:
        groups.append({**_group("gates", gates, config.gate_learning_rate, 0.0), "scheduled": False})
    return groups


def _group(name: str, parameters: dict[str, nn.Parameter], rate: float, decay: float) -> dict[str, Any]:
    return {
        "name": name,
        "params": list(parameters.values()),
        "param_names": list(parameters),
        "lr": rate,
        "weight_decay": decay,
        "scheduled": True,
    }


def new_optimizer(
    groups: list[dict[str, Any]], moments: Mapping[str, Tensor], phase: str, device: torch.device
) -> torch.optim.AdamW:
    """AdamW for a phase.

    Args:
        groups: as `parameter_groups` gives them.
        moments: of `moments_of` at the end of the phase before; parameters of the same name keep theirs.
        phase: for the error's text.
        device: that is trained on.

    Raises:
        TrainingError: there is nothing to train.
    """
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise TrainingError(f"phase {phase}: nothing to train; see lora_share and ia3_share")
    optimizer = torch.optim.AdamW(
        [{**group, "peak_lr": group["lr"]} for group in groups],
        betas=(0.9, 0.95),
        fused=device.type == "cpu",  # one pass over memory instead of ten
    )
    for name, parameter in named_parameters(optimizer.param_groups).items():
        if f"step.{name}" in moments:
            optimizer.state[parameter] = {
                # the step counter stays on the CPU, where AdamW keeps it
                moment: tensor if moment == "step" else shared_out(tensor, parameter)
                for moment in MOMENTS
                for tensor in [moments[f"{moment}.{name}"]]
            }
    return optimizer


def moments_of(optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """AdamW's state by parameter name, in one piece: `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME`."""
    if optimizer is None:
        return {}
    return {
        f"{moment}.{name}": whole(optimizer.state[parameter][moment])
        for name, parameter in named_parameters(optimizer.param_groups).items()
        if parameter in optimizer.state
        for moment in MOMENTS
    }


def named_parameters(groups: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """What parameter groups train, by name."""
    return {
        name: parameter
        for group in groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }


def clip_gradients(optimizer: torch.optim.Optimizer, largest: float) -> float:
    """Clips the weights' gradients; those of gates have a scale of their own, and are left.

    Returns:
        The norm of the weights' gradients before; NaN where that of the gates is not finite.
    """
    weights = [p for group in optimizer.param_groups if group["scheduled"] for p in group["params"]]
    gates = [p for group in optimizer.param_groups if not group["scheduled"] for p in group["params"]]
    norm = whole(torch.nn.utils.clip_grad_norm_(weights, largest))
    if gates:
        of_gates = torch.nn.utils.get_total_norm([p.grad for p in gates if p.grad is not None])
        return math.nan if not bool(torch.isfinite(of_gates)) else float(norm)
    return float(norm)
