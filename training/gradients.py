"""A run stops where a trainable parameter takes no part in the model."""

from __future__ import annotations

import torch
from torch import nn

from training.parallel import own_piece
from training.team import ALONE, Team
from yunmin.errors import TrainingError

_ZERO_STEPS = 10  # LoRA's A is exactly zero at the first step, and must not be at the tenth


class GradientWatch:
    """Checks the first steps of a phase.

    Args:
        model: whose trainable parameters are watched.
        phase: for the error's text.
        team: that trains together.
    """

    def __init__(self, model: nn.Module, phase: str, team: Team = ALONE) -> None:
        self._model = model
        self._phase = phase
        self._team = team
        self._steps = 0
        self._only_zero = {name for name, p in model.named_parameters() if p.requires_grad}

    def check(self) -> None:
        """Looks at the gradients of one step.

        Raises:
            TrainingError: a trainable parameter has none, or a zero one for ten steps; names it.
        """
        self._steps += 1
        if self._steps > _ZERO_STEPS:
            return
        trainable = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        for name, parameter in trainable.items():
            if parameter.grad is None:
                raise TrainingError(f"phase {self._phase}: parameter {name!r} is trainable and has no gradient")
        found = torch.tensor([float(own_piece(p.grad).any()) for p in trainable.values() if p.grad is not None])
        anywhere = self._team.total(found).tolist()  # a process may hold an empty shard
        self._only_zero -= {name for name, is_found in zip(trainable, anywhere, strict=True) if is_found}
        if self._steps == _ZERO_STEPS and self._only_zero:
            name = min(self._only_zero)
            raise TrainingError(f"phase {self._phase}: the gradient of {name!r} was zero for {_ZERO_STEPS} steps")
