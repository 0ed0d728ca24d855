"""Pillar 1: an order of the inner channels that puts like channels side by side.

It changes no function; it decides which channels share a block gate, an N:M group or an int4 scale. An objective says
what alike means. Without one it is correlation: the cost of a neighbourhood is 1 - |rho|, rho being the correlation of
two channels' activations after the convolution, and the order is a short Hamiltonian path through all channels: nearest
neighbour, then 2-opt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from yunmin.channel_path import Matrix, correlation_matrix, nearest_neighbour, path_cost, two_opt
from yunmin.errors import ShapeError, YunminError


class VariableScanOptimizer:
    """Accumulates activation statistics of one layer and solves for an order of its channels.

    Args:
        d_model: number of channels to order (a layer's inner width).
        update_frequency: calls of `update_permutation` between two solutions.
        start: "identity", or "random" drawn from `generator`.
        mode: "static" solves once, "dynamic" again after every further `update_frequency` calls.
        generator: source of the random start.
        objective: given the order and the channels' mean squares, a better order or the same; None solves for short
            paths between correlated channels.
    """

    def __init__(
        self,
        d_model: int,
        update_frequency: int = 1000,
        *,
        start: Literal["identity", "random"] = "identity",
        mode: Literal["static", "dynamic"] = "dynamic",
        generator: torch.Generator | None = None,
        objective: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.d_model = d_model
        self.objective = objective
        self.update_frequency = update_frequency
        self.mode = mode
        self.solutions = 0
        self._solved_for = torch.ones(d_model, dtype=torch.float64)  # mean squares (D,) at the last solution
        self._order = torch.randperm(d_model, generator=generator) if start == "random" else torch.arange(d_model)
        self._reset()

    def _reset(self) -> None:
        self._calls = 0
        self._count = 0.0
        self._mean = torch.zeros(self.d_model, dtype=torch.float64)
        shape = (self.d_model, self.d_model) if self.objective is None else (self.d_model,)
        self._comoment = torch.zeros(shape, dtype=torch.float64)  # only a path through correlations needs all of it
        self._weight = torch.zeros(self.d_model, dtype=torch.float64)

    @property
    def is_done(self) -> bool:
        """Whether a static order is already solved, so that nothing need be observed any more."""
        return self.mode == "static" and self.solutions > 0

    def update_permutation(self, x: Tensor, gradient: Tensor | None = None) -> bool:
        """Adds a batch to the statistics, and solves when it is time.

        Args:
            x: activations of the channels (B, L, D), after the convolution or what the scan gives.
            gradient: of the loss with respect to x (B, L, D); weighs channels by mean |x * gradient|, or None.

        Returns:
            Whether the order changed.

        Raises:
            ShapeError: x has another number of channels.
            YunminError: x is not finite.
        """
        if x.dim() != 3 or x.shape[2] != self.d_model:
            raise ShapeError(f"update_permutation: x has shape {tuple(x.shape)}, expected (B, L, {self.d_model})")
        if self.is_done:
            return False
        rows = x.detach().reshape(-1, self.d_model).to(device="cpu", dtype=torch.float64)  # (B*L, D)
        if not bool(torch.isfinite(rows).all()):
            raise YunminError("update_permutation: the activations are not finite")
        self._accumulate(rows)
        if gradient is not None:
            saliency = rows * gradient.detach().reshape(-1, self.d_model).to(device="cpu", dtype=torch.float64)
            self._weight += saliency.abs().mean(0)
        self._calls += 1
        return self._calls >= self.update_frequency and self.solve()

    def solve(self) -> bool:
        """Solves for the order from what was accumulated, then starts afresh; returns whether the order changed."""
        if self._count < 2 or self.is_done:
            return False
        solved = self._by_correlation() if self.objective is None else self.objective(self._order, self.mean_squares())
        improved = not torch.equal(solved, self._order)
        self._order, self._solved_for = solved, self.mean_squares()
        self.solutions += 1
        self._reset()
        return improved

    def latest_mean_squares(self) -> Tensor:
        """Mean squares of what was seen since the last solution, or for it; all the same where nothing was seen."""
        return self.mean_squares() if self._count else self._solved_for

    def mean_squares(self) -> Tensor:
        """Mean square of each channel over what was accumulated, float64 (D,)."""
        own = self._comoment if self._comoment.dim() == 1 else self._comoment.diagonal()
        return own / max(self._count, 1.0) + self._mean.square()

    def _by_correlation(self) -> Tensor:
        cost = self.cost_matrix()
        current = self._order.numpy()
        solved = two_opt(nearest_neighbour(cost, int(current[0])), cost)
        improved = path_cost(solved, cost) < path_cost(current, cost) - 1e-12
        return torch.from_numpy(solved) if improved else self._order

    def get_permutation(self) -> Tensor:
        """The channel at each position, int64 (D,)."""
        return self._order.clone()

    def adopt(self, order: Tensor) -> None:
        """Takes over the order that another process solved for."""
        self._order = order.clone()

    def get_inverse_permutation(self) -> Tensor:
        """The position of each channel, int64 (D,)."""
        return torch.argsort(self._order)

    def correlation(self) -> Matrix:
        """Correlations of the channels, (D, D); 0 with a channel that is constant."""
        return correlation_matrix(self._mean, self._comoment / max(self._count, 1.0))

    def cost_matrix(self) -> Matrix:
        """Cost of having two channels side by side, (D, D)."""
        cost = 1.0 - np.abs(self.correlation())
        weight = self._weight.numpy()
        if weight.sum() > 0:
            relative = weight / weight.mean()
            cost = cost * (relative[:, None] + relative[None, :]) / 2
        return cost

    def statistics(self) -> dict[str, Tensor]:
        """What `load_statistics` needs to go on exactly here."""
        return {
            "order": self._order.clone(),
            "counters": torch.tensor([float(self._calls), self._count, float(self.solutions)], dtype=torch.float64),
            "mean": self._mean.clone(),
            "comoment": self._comoment.clone(),
            "weight": self._weight.clone(),
            "solved_for": self._solved_for.clone(),
        }

    def load_statistics(self, saved: dict[str, Tensor]) -> None:
        """Continues from `statistics()`; where only the order was kept, statistics start afresh."""
        self._order = saved["order"].clone()
        calls, count, solutions = saved["counters"].tolist()
        self._reset()
        self.solutions = int(solutions)
        self._solved_for = saved["solved_for"].clone()
        if "comoment" in saved:
            self._calls, self._count = int(calls), count
            self._mean, self._comoment, self._weight = (saved[k].clone() for k in ("mean", "comoment", "weight"))

    def _accumulate(self, rows: Tensor) -> None:
        """Merges a batch's mean and co-moment into the running ones (Chan, Golub & LeVeque 1983)."""
        count = float(rows.shape[0])
        if count == 0:
            return
        mean = rows.mean(0)
        centered = rows - mean
        shift = mean - self._mean
        total = self._count + count
        share = self._count * count / total
        if self._comoment.dim() == 1:
            self._comoment += centered.square().sum(0) + shift.square() * share
        else:
            self._comoment += centered.T @ centered + torch.outer(shift, shift) * share
        self._mean += shift * (count / total)
        self._count = total
