"""Pillar 3: how much each projection matters, measured while masking learns."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from training.team import ALONE, Team


class ImportanceProbe:
    """Accumulates mean |g * dLoss/dg| for a unit multiplier g on the output of each projection.

    With g = 1 this is the first-order change of the loss when an output unit vanishes (Molchanov et al. 2019), and
    multiplying by 1 changes no bit of the forward pass.

    Args:
        projections: modules to measure, by name.
        team: that trains together.
    """

    def __init__(self, projections: Mapping[str, nn.Module], team: Team = ALONE) -> None:
        self.projections = dict(projections)
        self._team = team
        self.scores = torch.zeros(len(self.projections), dtype=torch.float64)
        self.steps = 0
        self._multipliers: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Starts measuring; does nothing when it already does."""
        if self._handles:
            return
        for name, module in self.projections.items():
            self._handles.append(module.register_forward_hook(self._multiply(name)))

    def detach(self) -> None:
        """Stops measuring."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._multipliers.clear()

    def collect(self) -> None:
        """Adds the gradients of a step, all parts of its batch and all processes of the team taken together."""
        if not self._handles:
            return
        for position, name in enumerate(self.projections):
            multiplier = self._multipliers.get(name)
            if multiplier is not None and multiplier.grad is not None:
                gradient = self._team.total(multiplier.grad) / self._team.size  # losses come multiplied by the size
                self.scores[position] += float((multiplier.detach() * gradient).abs().mean())
        self._multipliers.clear()
        self.steps += 1

    def means(self) -> dict[str, float]:
        """Score of each projection, averaged over the steps measured."""
        return dict(zip(self.projections, (self.scores / max(1, self.steps)).tolist(), strict=True))

    def _multiply(self, name: str):  # type: ignore[no-untyped-def]  # the hook's type is private to torch
        def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            multiplier = self._multipliers.get(name)  # the same one for all parts of a batch
            if multiplier is None:
                multiplier = torch.ones(output.shape[-1], dtype=output.dtype, device=output.device, requires_grad=True)
                self._multipliers[name] = multiplier
            return output * multiplier

        return hook
