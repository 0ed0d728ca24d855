"""A short path through all channels, so that correlated ones are neighbours: nearest neighbour, then 2-opt."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Matrix = NDArray[np.float64]
Order = NDArray[np.int64]

_CONSTANT = 1e-10  # a channel whose deviation is below this share of its magnitude carries no correlation
_MAX_PASSES = 20  # of 2-opt; it converges in fewer on real activations


def correlation_matrix(mean: Tensor, covariance: Tensor) -> Matrix:
    """Correlations of channels, (D, D); 0 with a channel that is constant.

    Args:
        mean: float64 (D,).
        covariance: float64 (D, D).
    """
    deviation = covariance.diagonal().clamp_min(0.0).sqrt()
    is_constant = deviation <= _CONSTANT * (mean.abs() + deviation.max())
    scale = torch.where(is_constant, torch.inf, deviation)
    return (covariance / scale[:, None] / scale[None, :]).clamp(-1.0, 1.0).numpy()


def nearest_neighbour(cost: Matrix, start: int) -> Order:
    """A path through all channels that always goes to the nearest one left."""
    size = cost.shape[0]
    order = np.empty(size, dtype=np.int64)
    order[0] = start
    is_left = np.ones(size, dtype=bool)
    is_left[start] = False
    for position in range(1, size):
        order[position] = np.where(is_left, cost[order[position - 1]], np.inf).argmin()
        is_left[order[position]] = False
    return order


def two_opt(order: Order, cost: Matrix) -> Order:
    """Reverses segments of a path while that shortens it (Croes 1958), with open ends."""
    order = order.copy()
    size = order.size
    for _ in range(_MAX_PASSES):
        improved = False
        for i in range(size - 1):
            # reversing order[i..j] replaces the edges (i-1, i) and (j, j+1); an end of the path has no edge
            ends = np.arange(i + 1, size)
            after = order[np.minimum(ends + 1, size - 1)]
            has_after = ends + 1 < size
            gain = np.where(has_after, cost[order[ends], after] - cost[order[i], after], 0.0)
            if i > 0:
                before = order[i - 1]
                gain = gain + cost[before, order[i]] - cost[before, order[ends]]
            best = int(gain.argmax())
            if gain[best] > 1e-12:
                order[i : ends[best] + 1] = order[i : ends[best] + 1][::-1].copy()
                improved = True
        if not improved:
            break
    return order


def path_cost(order: Order, cost: Matrix) -> float:
    """Sum of the costs between neighbours."""
    return float(cost[order[:-1], order[1:]].sum())
