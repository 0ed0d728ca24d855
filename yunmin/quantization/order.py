"""An order of channels in which groups of 32 neighbours lose least when their weights share a scale.

The error of a group grows with the square of its largest weight, so channels of like magnitude belong together. The
search starts from channels sorted by the size of their weights and swaps channels between groups while that lowers

    sum over rows r and groups g of  max_{j in g} |w_rj|^2 * sum_{j in g} h_j

h_j being the mean square of input j. What is returned is at least as good as the order it began with, by the error that
rounding really leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from yunmin.quantization.layout import GROUP_SIZE
from yunmin.quantization.rounding import relative_error, round_weight

_ROWS_SEARCHED = 2048  # of each stack of rows: enough to know the size of a column's weights
_SWEEPS = 4
_DISTANCE = 4  # groups are compared with so many after them: sorted, the others hold weights of another size
_SWAPS = 4  # of one pair of groups per sweep
_LEAST_GAIN = 1e-6  # of an order, as a share of the error: less is rounding
_SEED = 0


@dataclass(frozen=True)
class Grouped:
    """A weight whose inputs are to be ordered.

    Attributes:
        weight: float32 (rows, n).
        importance: mean squares of the inputs (n,); None for all the same.
    """

    weight: Tensor
    importance: Tensor | None = None

    def error(self, order: Tensor | None = None) -> float:
        """Relative error of rounding to int4, the inputs in an order."""
        weight, importance = self.weight, self.importance
        if order is not None:
            weight = weight[:, order]
            importance = None if importance is None else importance[order]
        return relative_error(weight, round_weight(weight, "int4", importance).dequantized(), importance)


def quantization_order(weights: Sequence[Grouped], start: Tensor | None = None) -> Tensor:
    """Orders the inputs that some weights have in common.

    Args:
        weights: each counts by its relative error.
        start: an order to improve on, int64 (n,); None for the one they have.

    Returns:
        The input at each position, int64 (n,).
    """
    size = weights[0].weight.shape[1]
    start = torch.arange(size) if start is None else start
    weights = [_sampled(weight) for weight in weights]
    search = _Search(weights)
    by_size = torch.argsort(search.sizes, descending=True)
    candidates = [start, by_size, search.improved(by_size)]
    errors = [sum(weight.error(order) for weight in weights) for order in candidates]
    best = min(range(len(candidates)), key=lambda i: (errors[i], i))
    return candidates[best] if errors[best] < errors[0] * (1 - _LEAST_GAIN) else start


class _Search:
    """Swaps channels between groups; squares of all weights, those of one matrix scaled to sum to 1."""

    def __init__(self, weights: Sequence[Grouped]) -> None:
        ones = torch.ones(weights[0].weight.shape[1])
        self.importance = [ones if w.importance is None else w.importance / w.importance.mean() for w in weights]
        squares = [w.weight.square() for w in weights]
        self.squares = [s / (s @ h).sum() for s, h in zip(squares, self.importance, strict=True)]

    @property
    def sizes(self) -> Tensor:
        """How large each channel's weights are (n,)."""
        return torch.stack([square.sum(0) for square in self.squares]).sum(0)

    def improved(self, order: Tensor) -> Tensor:
        groups = list(order.split(GROUP_SIZE))
        for _ in range(_SWEEPS):
            swaps = 0
            for first in range(len(groups)):
                for second in range(first + 1, min(first + 1 + _DISTANCE, len(groups))):
                    swaps += self._swap(groups, first, second)
            if swaps == 0:
                break
        return torch.cat(self._by_importance(groups))

    def _swap(self, groups: list[Tensor], first: int, second: int) -> int:
        """Makes the best swaps between two groups; returns how many."""
        for done in range(_SWAPS):
            a, b = groups[first], groups[second]
            gain = torch.zeros(a.numel(), b.numel())
            for squares, importance in zip(self.squares, self.importance, strict=True):
                gain += self._gain(squares[:, a], squares[:, b], importance[a], importance[b])
            best = int(gain.argmax())
            if gain.view(-1)[best] <= 1e-9:
                return done
            i, j = divmod(best, b.numel())
            a, b = a.clone(), b.clone()
            a[i], b[j] = groups[second][j], groups[first][i]
            groups[first], groups[second] = a, b
        return _SWAPS

    @staticmethod
    def _gain(a: Tensor, b: Tensor, h_a: Tensor, h_b: Tensor) -> Tensor:
        """How much less two groups lose when channel i of a and j of b change places (|a|, |b|).

        Args:
            a, b: squared weights (rows, channels).
            h_a, h_b: importance of the channels.
        """
        before = a.amax(1).sum() * h_a.sum() + b.amax(1).sum() * h_b.sum()
        in_a = torch.maximum(_without(a)[:, :, None], b[:, None, :]).sum(0)  # b_j in place of a_i
        in_b = torch.maximum(_without(b)[:, None, :], a[:, :, None]).sum(0)
        moved = h_b[None, :] - h_a[:, None]
        return before - in_a * (h_a.sum() + moved) - in_b * (h_b.sum() - moved)

    def _by_importance(self, groups: list[Tensor]) -> list[Tensor]:
        """Groups of important inputs first, since calibrated rounding makes up for them later; a short one last."""
        whole = [group for group in groups if group.numel() == GROUP_SIZE]
        importance = torch.stack(self.importance).sum(0)
        whole.sort(key=lambda group: -float(importance[group].sum()))
        return whole + [group for group in groups if group.numel() < GROUP_SIZE]


def _without(squares: Tensor) -> Tensor:
    """Each row's largest value when one column is left out (rows, columns)."""
    if squares.shape[1] == 1:
        return torch.zeros_like(squares)
    top = squares.topk(2, dim=1).values
    return torch.where(squares == top[:, :1], top[:, 1:], top[:, :1])


def _sampled(weight: Grouped) -> Grouped:
    rows = weight.weight.shape[0]
    if rows <= _ROWS_SEARCHED:
        return weight
    chosen = torch.randperm(rows, generator=torch.Generator().manual_seed(_SEED))[:_ROWS_SEARCHED]
    return Grouped(weight.weight[chosen], weight.importance)
