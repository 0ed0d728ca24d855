"""An order of channels in which N:M masks keep as much magnitude as they can.

An N:M mask keeps the N largest of every M neighbouring weights of a row, so what it loses depends on which channels are
neighbours. The search swaps channels between groups of M while that raises the sum of the magnitudes kept, the best
swaps first (Pool & Yu 2021, "Channel permutations for N:M sparsity", section 4).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from yunmin.errors import ShapeError

_ROWS_SEARCHED = 512  # of all rows: enough to know which channels are large together
_CHUNK = 1 << 24  # numbers compared at once
_MAX_PASSES = 100
_CONSIDERED = 32  # swaps in one pass, for each group
_LEAST_GAIN = 1e-7  # of a swap, as a share of all magnitude
_SEED = 0


def retained_magnitude(weight: Tensor, n: int, m: int, order: Tensor | None = None) -> float:
    """The share of a weight's magnitude that an N:M mask along its columns keeps.

    Args:
        weight: (rows, columns).
        n, m: n weights kept of every m neighbours.
        order: of the columns, int64; None for the one they have.

    Raises:
        ShapeError: m does not divide the columns.
    """
    magnitude = weight.abs() if order is None else weight[:, order].abs()
    return float(_kept(magnitude, n, m).sum() / magnitude.sum())


def n_of_m_order(weights: Sequence[Tensor], n: int, m: int, start: Tensor | None = None) -> Tensor:
    """Orders the columns that some weights have in common.

    Args:
        weights: float32 (rows, columns), each of which counts by the share of its own magnitude.
        n, m: n weights kept of every m neighbours.
        start: an order to improve on, int64 (columns,); None for the one they have.

    Returns:
        The column at each position, int64 (columns,); keeps no less than `start` in the rows that were searched.

    Raises:
        ShapeError: m does not divide the columns.
    """
    _grouped(weights[0], m)
    magnitude = torch.cat([weight.abs() / weight.abs().sum() for weight in weights])  # (rows, columns)
    rows = torch.randperm(magnitude.shape[0], generator=torch.Generator().manual_seed(_SEED))[:_ROWS_SEARCHED]
    magnitude = magnitude[rows] / magnitude[rows].sum()
    columns = magnitude.shape[1]
    order = torch.arange(columns) if start is None else start
    groups = order.view(-1, m).clone()  # (groups, m), columns
    replaced, kept = torch.empty(columns, columns), torch.empty(columns)
    touched = torch.arange(groups.shape[0])
    for _ in range(_MAX_PASSES):
        if touched.numel() == 0:
            break
        replaced[groups[touched].flatten()] = _when_replaced(magnitude, groups[touched], n)
        kept[groups[touched]] = _kept(magnitude[:, groups[touched].flatten()], n, m).sum((0, 2))[:, None]
        touched = _swap(groups, replaced + replaced.T - kept[:, None] - kept[None, :])
    return groups.flatten()


def _when_replaced(magnitude: Tensor, groups: Tensor, n: int) -> Tensor:
    """What a group keeps when one of its members is another column (groups * m, columns)."""
    members = magnitude[:, groups]  # (rows, groups, m)
    replaced = torch.empty(*groups.shape, magnitude.shape[1])
    size = max(1, _CHUNK // magnitude.numel())
    for position in range(groups.shape[1]):
        others = torch.cat([members[..., :position], members[..., position + 1 :]], dim=-1)
        largest = others.topk(n, dim=-1).values  # (rows, groups, n)
        # the n - 1 largest of the others stay, and the larger of the next one and the newcomer
        certain, last = largest[..., :-1].sum((0, 2)), largest[..., -1]  # (groups,), (rows, groups)
        for begin in range(0, groups.shape[0], size):
            some = slice(begin, begin + size)
            raised = torch.maximum(last[:, some, None], magnitude[:, None, :]).sum(0)  # (size, columns)
            replaced[some, position] = certain[some, None] + raised
    return replaced.flatten(0, 1)


def _swap(groups: Tensor, gain: Tensor) -> Tensor:
    """Swaps columns between groups, in place, at most one pair for each group, the best first.

    Args:
        groups: columns of each group (groups, m).
        gain: of swapping two columns (columns, columns).

    Returns:
        The groups that changed.
    """
    count, m = groups.shape
    home = torch.empty(gain.shape[0], dtype=torch.int64)  # each column's position
    home[groups.flatten()] = torch.arange(gain.shape[0])
    is_one_group = (home // m)[:, None] == (home // m)[None, :]
    best = gain.masked_fill(is_one_group, 0.0).flatten().topk(min(gain.numel(), _CONSIDERED * count))
    flat, touched = groups.view(-1), set[int]()
    for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        a, b = (int(home[column]) for column in divmod(index, gain.shape[0]))
        if value > _LEAST_GAIN and touched.isdisjoint((a // m, b // m)):
            touched |= {a // m, b // m}
            flat[[a, b]] = flat[[b, a]]
    return torch.tensor(sorted(touched), dtype=torch.int64)


def _kept(magnitude: Tensor, n: int, m: int) -> Tensor:
    """The n largest of every m neighbours (rows, groups, n)."""
    return _grouped(magnitude, m).topk(n, dim=-1).values


def _grouped(magnitude: Tensor, m: int) -> Tensor:
    rows, columns = magnitude.shape
    if columns % m:
        raise ShapeError(f"an N:M mask needs a multiple of {m} columns, got {columns}")
    return magnitude.view(rows, columns // m, m)
