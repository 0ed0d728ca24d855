"""Pillar 3: how well LoRA can follow the gradient of each projection's weight, rank by rank.

LoRA of rank r moves a weight along r directions. Of the gradient G the best ones are its leading singular vectors, and
along them the loss falls with the squares of the singular values (first order, one step). So a rank of a projection is
worth its squared singular value for each number that it trains; and LoRA that starts with the inputs' directions of
these ranks in A, and zero in B, takes its first step along the gradient (Wang et al. 2024, LoRA-GA).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from training.team import ALONE, Team


@dataclass(frozen=True)
class Spectrum:
    """The gradient of a projection's weight (out, in).

    Attributes:
        worth: squared singular values over `in + out`, the numbers that a rank trains; descending, float32 (k,).
        directions: of the inputs, unit vectors, one for each rank (k, in).
    """

    worth: Tensor
    directions: Tensor


class SpectrumProbe:
    """Accumulates the gradients of projections' weights, which may be frozen.

    Args:
        projections: linear modules, by name.
        team: that trains together.
    """

    def __init__(self, projections: Mapping[str, nn.Module], team: Team = ALONE) -> None:
        self._projections = dict(projections)
        self._team = team
        self._gradients: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Starts measuring."""
        for name, module in self._projections.items():
            self._handles.append(module.register_forward_hook(self._watch(name)))

    def detach(self) -> None:
        """Stops measuring."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def spectra(self) -> dict[str, Spectrum]:
        """Of the sum over all steps and all processes of the team, by the projection's name."""
        found = {}
        for name, gradient in self._gradients.items():
            whole = self._team.total(gradient).cpu()
            _, values, directions = torch.linalg.svd(whole, full_matrices=False)
            found[name] = Spectrum(values.square() / sum(whole.shape), directions)
        return found

    def _watch(self, name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            # a scalar of one asks for gradients and changes no bit, although all weights are frozen
            marked = output * torch.ones((), dtype=output.dtype, device=output.device, requires_grad=True)
            x = inputs[0].detach().flatten(0, -2)  # (tokens, in)

            def add(gradient: Tensor) -> None:
                step = gradient.flatten(0, -2).float().T @ x.float()  # (out, in)
                self._gradients[name] = self._gradients[name] + step if name in self._gradients else step

            marked.register_hook(add)
            return marked

        return hook
