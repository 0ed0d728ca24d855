"""Pillar 2: what sparsity costs, how it is held at its target, and how widths become exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from yunmin.config import MambaConfig
from yunmin.errors import ConfigError

Unit = Literal["parameters", "flops", "bytes"]

_RAMP = 0.2  # share of the gate phase over which the target rises to its final value
# The linear multiplier integrates the gap and alone would swing around the target; the quadratic one, ascending faster,
# damps it. Chosen by simulating gate phases of 100 and 400 steps.
_QUADRATIC_RATE = 100.0


class SparsityTarget:
    """Holds an expected sparsity at a target by two Lagrange multipliers, learned by ascent.

    The penalty is a*(s - t) + b*(s - t)^2 for sparsity s and target t (Wang, Wohlwend & Lei 2020, eq. 6); the model
    descends on it while a and b ascend.

    Args:
        target: final sparsity, 0 to 1.
        learning_rate: of the ascent.
    """

    def __init__(self, target: float, learning_rate: float) -> None:
        self.final = target
        self.learning_rate = learning_rate
        self.multipliers = torch.zeros(2, dtype=torch.float64)
        self.target = 0.0

    def advance(self, progress: float) -> None:
        """Sets the target for a point of the gate phase, 0 to 1."""
        self.target = self.final * min(1.0, progress / _RAMP)

    def penalty(self, sparsity: Tensor) -> Tensor:
        """The term to add to the loss."""
        gap = sparsity - self.target
        linear, quadratic = self.multipliers.tolist()
        penalty: Tensor = linear * gap + quadratic * gap**2
        return penalty

    def ascend(self, sparsity: float) -> None:
        """One step of ascent; the quadratic multiplier can only grow."""
        gap = sparsity - self.target
        self.multipliers += self.learning_rate * torch.tensor([gap, _QUADRATIC_RATE * gap**2], dtype=torch.float64)


def layer_costs(config: MambaConfig, channels: Sequence[Tensor], states: Sequence[Tensor], unit: Unit) -> list[Tensor]:
    """What the gated part of each layer costs with so many channels and states, differentiable in both.

    Args:
        config: gives what a channel costs besides its states.
        channels: per layer, how many are kept, scalar.
        states: per layer, how many are kept, scalar.
        unit: parameters, FLOPs per token, or bytes of weights and state.
    """
    d, rank, taps = config.d_model, config.dt_rank, config.d_conv
    numbers = 3 * d + 2 * rank + taps + 2 + int(config.use_conv_bias) + 2 * int(config.use_bias)
    match unit:
        case "parameters":
            per_channel, per_state = numbers, 3
        case "flops":
            per_channel, per_state = 2 * (3 * d + 2 * rank) + 2 * taps + 17, 11
        case "bytes":
            per_channel, per_state = 4 * numbers + 4 * (taps - 1), 16
    return [c * (per_channel + per_state * n) for c, n in zip(channels, states, strict=True)]


def kept_channels(width: int, sparsity: float, multiple: int) -> int:
    """Channels to keep: the multiple of `multiple` nearest to the target, at least one multiple.

    Raises:
        ConfigError: the layer is narrower than one multiple.
    """
    if width < multiple:
        raise ConfigError(f"channel_multiple: must be at most the inner width {width}, got {multiple}")
    return min(width, max(1, round(width * (1 - sparsity) / multiple)) * multiple)


def kept_states(width: int, sparsity: float) -> int:
    """States to keep: the power of two nearest to the target; all of them at sparsity 0."""
    if sparsity == 0:
        return width
    wanted = max(1.0, width * (1 - sparsity))
    low = 1 << math.floor(math.log2(wanted))
    return min(width, low if wanted - low <= 2 * low - wanted else 2 * low)


def best_units(scores: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """Exactly `counts[i]` units of each layer, those of highest score; bool, ties broken by position."""
    chosen = []
    for score, count in zip(scores, counts, strict=True):
        is_kept = torch.zeros(score.shape, dtype=torch.bool)
        is_kept[torch.sort(score.detach().cpu(), descending=True, stable=True).indices[:count]] = True
        chosen.append(is_kept)
    return chosen


def shared_counts(scores: Sequence[Tensor], sparsity: float, multiple: int) -> list[int]:
    """Units to keep per layer when all layers compete: the best overall, snapped to multiples in each layer.

    Args:
        scores: per layer, one score per unit.
        sparsity: share to cut over all layers.
        multiple: counts become multiples of this, at least one.
    """
    everything = torch.cat([score.detach().cpu().flatten() for score in scores])
    total = max(1, round(everything.numel() * (1 - sparsity)))
    is_kept = torch.zeros(everything.numel(), dtype=torch.bool)
    is_kept[torch.sort(everything, descending=True, stable=True).indices[:total]] = True
    widths = [score.numel() for score in scores]
    counts = [int(part.sum()) for part in torch.split(is_kept, widths)]
    return [min(width, max(1, round(count / multiple)) * multiple) for count, width in zip(counts, widths, strict=True)]


def masking_statistics(
    config: MambaConfig, keep: Sequence[Tensor], states: Sequence[Tensor], unit: Unit
) -> dict[str, float | list[float]]:
    """What masking takes away, overall and by layer.

    Args:
        config: of the model before the cut.
        keep: per layer, the probability that each inner channel is kept (D,).
        states: per layer, how many states are kept, scalar.
        unit: that sparsity is counted in.

    Returns:
        `sparsity` overall; by layer `layer_sparsity` (share of the layer that goes), `layer_contribution` (that share
        of the whole model) and the mean `keep_probability`.
    """
    all_states = [torch.tensor(float(n)) for n in config.d_state]
    full = layer_costs(config, [torch.tensor(float(d)) for d in config.d_inner], all_states, unit)
    kept = layer_costs(config, [k.sum() for k in keep], states, unit)
    cut = [float(f - k) for f, k in zip(full, kept, strict=True)]
    total = float(torch.stack(full).sum())
    return {
        "sparsity": sum(cut) / total,
        "layer_sparsity": [c / float(f) for c, f in zip(cut, full, strict=True)],
        "layer_contribution": [c / total for c in cut],
        "keep_probability": [float(k.mean()) for k in keep],
    }
