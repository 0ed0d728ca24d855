"""Pillar 2: gates that learn which parts of a model may go."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

Estimator = Literal["gumbel_sigmoid", "hard_concrete"]

INITIAL_LOGIT = 2.5  # where gates start alike: keeps 92 %, open, yet with a gradient
_STRETCH_LOW, _STRETCH_HIGH, _BETA = -0.1, 1.1, 2.0 / 3.0  # Louizos, Welling & Kingma 2018, section 4
_LEAST_KEPT = 0.05  # a unit that is kept must not be cut by a value of zero


class Drawn(NamedTuple):
    """Noise of a draw, one number of 0 to 1 for each unit, and its temperature."""

    uniform: Tensor
    temperature: float


class LearnedGate(nn.Module):
    """Gates with learned logits; `forward()` returns the values in force, one for each channel, state or weight.

    `gumbel_sigmoid` draws 0 or 1 with P(1) = sigmoid(logit), passing gradients straight through a sigmoid of the same
    draw (Jang et al. 2017; logistic noise, the difference of two Gumbel draws). `hard_concrete` draws from a stretched
    and clamped sigmoid instead (Louizos et al. 2018).

    Args:
        logits: initial logits, one per unit, any shape.
        unit_of: int64, the unit that each gate value belongs to; None where each unit is one value.
        estimator: which distribution.
    """

    unit_of: Tensor | None

    def __init__(self, logits: Tensor, unit_of: Tensor | None = None, estimator: Estimator = "gumbel_sigmoid") -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())
        self.register_buffer("unit_of", unit_of, persistent=False)
        self.estimator = estimator
        self._drawn: Drawn | None = None

    def forward(self) -> Tensor:
        """The values of the last draw, or the deterministic ones where none is in force.

        Each call makes them anew from the same noise, so that every part of a batch has a graph of its own.
        """
        return self.deterministic() if self._drawn is None else self._values(self._drawn)

    def sample(self, temperature: float, generator: torch.Generator) -> None:
        """Draws the values of the next forward passes.

        Args:
            temperature: of `gumbel_sigmoid`; `hard_concrete` has its own fixed one.
            generator: the source of noise, on the CPU.
        """
        uniform = torch.rand(self.logits.shape, generator=generator).clamp(1e-6, 1 - 1e-6).to(self.logits.device)
        self._drawn = Drawn(uniform, temperature)

    def settle(self) -> None:
        """Drops the draw: from here on the deterministic values are in force."""
        self._drawn = None

    def suspend(self) -> Drawn | None:
        """Settles and returns the draw, for `resume`."""
        drawn, self._drawn = self._drawn, None
        return drawn

    def resume(self, drawn: Drawn | None) -> None:
        """Puts a suspended draw back."""
        self._drawn = drawn

    def keep_probability(self) -> Tensor:
        """Probability that each value is not zero, differentiable."""
        shift = 0.0 if self.estimator == "gumbel_sigmoid" else _BETA * math.log(-_STRETCH_LOW / _STRETCH_HIGH)
        return self._spread(torch.sigmoid(self.logits - shift))

    def unit_values(self) -> Tensor:
        """The value each unit has when kept without noise: 1, or the mean of the hard-concrete draw."""
        if self.estimator == "gumbel_sigmoid":
            return torch.ones_like(self.logits)
        return _stretch(torch.sigmoid(self.logits)).clamp(min=_LEAST_KEPT)

    @torch.no_grad()
    def deterministic(self) -> Tensor:
        """Values without noise: units of keep-probability below one half are zero, but never all of them."""
        is_kept = self.logits > (0.0 if self.estimator == "gumbel_sigmoid" else math.log(-_STRETCH_LOW / _STRETCH_HIGH))
        if not bool(is_kept.any()):
            is_kept = self.logits == self.logits.max()
        return self._spread(self.unit_values() * is_kept)

    @torch.no_grad()
    def fixed(self, kept_units: Tensor) -> Tensor:
        """Final values when exactly `kept_units` (bool, of the logits' shape) are kept."""
        return self._spread(self.unit_values() * kept_units.to(self.logits.device))

    @torch.no_grad()
    def regroup(self, unit_of: Tensor) -> None:
        """Moves to other groups of channels: each new unit's logit is the mean over its channels' old ones."""
        assert self.unit_of is not None
        per_channel = self.logits[self.unit_of]
        sums = torch.zeros_like(self.logits).index_add_(0, unit_of, per_channel)
        counts = torch.zeros_like(self.logits).index_add_(0, unit_of, torch.ones_like(per_channel))
        self.logits.copy_(sums / counts)
        self.unit_of = unit_of
        self._drawn = None

    def _values(self, drawn: Drawn) -> Tensor:
        noisy = self.logits + torch.log(drawn.uniform) - torch.log1p(-drawn.uniform)
        if self.estimator == "gumbel_sigmoid":
            soft = torch.sigmoid(noisy / drawn.temperature)
            hard = (soft > 0.5).to(soft.dtype)
            values = (soft - soft.detach()) + hard  # in this order exactly 0 or 1
        else:
            values = _stretch(torch.sigmoid(noisy / _BETA))
        return self._spread(values)

    def _spread(self, values: Tensor) -> Tensor:
        return values if self.unit_of is None else values[self.unit_of]


def block_of_channel(scan_order: Tensor, block_size: int) -> Tensor:
    """The block each channel belongs to when neighbours in scan order form blocks, int64 (D,)."""
    return torch.argsort(scan_order) // block_size


def sums_by_unit(scores: Tensor, unit_of: Tensor) -> Tensor:
    """What the channels of each unit have together."""
    return torch.zeros(int(unit_of.max()) + 1, dtype=scores.dtype).index_add_(0, unit_of, scores)


def _stretch(values: Tensor) -> Tensor:
    return (values * (_STRETCH_HIGH - _STRETCH_LOW) + _STRETCH_LOW).clamp(0.0, 1.0)
