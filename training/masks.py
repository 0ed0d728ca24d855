"""Pillar 2: masks on single weights of the projections, learned like gates, then made exact.

They make zeros, not smaller tensors. An N:M mask keeps N of every M neighbours along the input axis; where that axis
is the inner one, neighbours are those in scan order among the channels that are left after the cut.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.gates import INITIAL_LOGIT
from yunmin.errors import ConfigError


def initial_mask_logits(weight: Tensor) -> Tensor:
    """Logits that start open and ranked by magnitude, of the weight's shape."""
    magnitude = weight.detach().abs()
    spread = magnitude.std().clamp(min=1e-12)
    return INITIAL_LOGIT + 0.5 * (magnitude - magnitude.mean()) / spread


def element_mask(scores: Tensor, sparsity: float, rows: Tensor, columns: Tensor) -> Tensor:
    """Keeps exactly the best share of a projection's weights.

    Args:
        scores: of every weight (out, in).
        sparsity: share of zeros among the surviving rows and columns.
        rows: int64, output positions that survive the cut.
        columns: int64, input positions that survive the cut.

    Returns:
        Bool (out, in); true wherever the cut removes the weight anyway.
    """
    inside = scores.detach().cpu()[rows][:, columns]
    count = max(1, round(inside.numel() * (1 - sparsity)))
    kept = torch.zeros(inside.numel(), dtype=torch.bool)
    kept[torch.sort(inside.flatten(), descending=True, stable=True).indices[:count]] = True
    return _embed(kept.view_as(inside), scores, rows, columns)


def n_of_m_mask(scores: Tensor, n: int, m: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Keeps the best n of every m neighbouring columns in each row.

    Args:
        scores: of every weight (out, in).
        n: weights kept per group.
        m: size of a group.
        rows: int64, output positions that survive the cut.
        columns: int64, input positions that survive the cut, in the order in which they form groups.

    Returns:
        Bool (out, in); true wherever the cut removes the weight anyway.

    Raises:
        ConfigError: m does not divide the number of surviving columns.
    """
    inside = scores.detach().cpu()[rows][:, columns]
    if inside.shape[1] % m:
        raise ConfigError(f"mask_m: {m} does not divide the {inside.shape[1]} input channels that are left")
    groups = inside.view(inside.shape[0], -1, m)  # (out, groups, m)
    best = torch.sort(groups, dim=-1, descending=True, stable=True).indices[..., :n]
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter(-1, best, value=True)
    return _embed(kept.view_as(inside), scores, rows, columns)


def _embed(kept: Tensor, scores: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    mask = torch.ones(scores.shape, dtype=torch.bool)
    mask[rows[:, None], columns[None, :]] = kept
    return mask
