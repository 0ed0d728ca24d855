"""What the inputs of a network's projections look like on real text."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from yunmin.axes import PROJECTIONS, layer_prefix
from yunmin.model import MambaLM

_BATCH_SIZE = 8


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of one projection's inputs.

    Attributes:
        tokens: that were observed.
        mean, mean_squares: of each input, float64 (n,).
        second_moments: mean of x x^T over the inputs x, float32 (n, n), where asked for.
    """

    tokens: int
    mean: Tensor
    mean_squares: Tensor
    second_moments: Tensor | None

    def covariance(self) -> Tensor:
        """Of the inputs, float64 (n, n); their second moments must have been asked for."""
        assert self.second_moments is not None
        return self.second_moments - torch.outer(self.mean, self.mean)


@torch.inference_mode()
def input_statistics(
    model: MambaLM, sequences: Tensor, *, second_moments: Collection[str] = ()
) -> dict[str, InputStatistics]:
    """Observes the inputs of every projection but `dt_proj`, by module name.

    Args:
        model: in evaluation mode.
        sequences: token ids, int64 (S, L).
        second_moments: projections for whose inputs they are kept, n * n numbers each.
    """
    names = [
        f"{layer_prefix(layer)}mixer.{projection}"
        for layer in range(model.config.n_layers)
        for projection in PROJECTIONS
        if projection != "dt_proj"
    ]
    sums = {name: _Sums(name.rpartition(".")[2] in second_moments) for name in names}
    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(sums[name].add))
        for rows in sequences.split(_BATCH_SIZE):
            model.backbone(rows, model.new_state(rows.shape[0]))
    return {name: found.statistics() for name, found in sums.items()}


class _Sums:
    def __init__(self, with_products: bool) -> None:
        self.with_products = with_products
        self.tokens = 0
        self.sum = self.squares = self.products = torch.zeros((), dtype=torch.float64)

    def add(self, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0].flatten(0, -2)  # (tokens, n)
        self.tokens += x.shape[0]
        wide = x.double()
        self.sum = self.sum + wide.sum(0)
        self.squares = self.squares + wide.square().sum(0)
        if self.with_products:
            if self.products.dim() == 0:
                self.products = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float32)
            self.products.addmm_(x.T.float(), x.float())

    def statistics(self) -> InputStatistics:
        mean = self.sum / self.tokens
        moments = self.products.div_(self.tokens) if self.with_products else None
        return InputStatistics(self.tokens, mean, self.squares / self.tokens, moments)
