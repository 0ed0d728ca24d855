"""A run stops where a trainable parameter takes no part in the model."""

from __future__ import annotations

from torch import nn

from yunmin.errors import TrainingError

_ZERO_STEPS = 10  # LoRA's A is exactly zero at the first step, and must not be at the tenth


class GradientWatch:
    """Checks the first steps of a phase.

    Args:
        model: whose trainable parameters are watched.
        phase: for the error's text.
    """

    def __init__(self, model: nn.Module, phase: str) -> None:
        self._model = model
        self._phase = phase
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
        for name, parameter in self._model.named_parameters():
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:
                raise TrainingError(f"phase {self._phase}: parameter {name!r} is trainable and has no gradient")
            if bool(parameter.grad.any()):
                self._only_zero.discard(name)
        if self._steps == _ZERO_STEPS and self._only_zero:
            name = min(self._only_zero)
            raise TrainingError(f"phase {self._phase}: the gradient of {name!r} was zero for {_ZERO_STEPS} steps")
