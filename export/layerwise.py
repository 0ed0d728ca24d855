"""One layer of a model at a time over calibration text, of which nothing but the residual stream is held."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from yunmin.model import MambaLM

_TOKENS_AT_ONCE = 4096  # bounds the memory of a layer's activations


class Layer:
    """What one layer computes on the calibration text, some sequences at a time.

    Args:
        model: whose layer it is.
        number: of the layer.
        residual: what the layers below give (S, L, d).
    """

    def __init__(self, model: MambaLM, number: int, residual: Tensor) -> None:
        self.model, self.number, self.residual = model, number, residual
        batch_size = max(1, _TOKENS_AT_ONCE // residual.shape[1])
        self._rows = [slice(first, first + batch_size) for first in range(0, residual.shape[0], batch_size)]

    def add_outputs(self) -> None:
        """Adds what the layer gives to the residual stream, in place."""
        for rows in self._rows:
            self.residual[rows] += self._output(rows)

    def inputs(self, linear: nn.Linear) -> Iterator[Tensor]:
        """What a projection of the layer is given, (tokens, inputs); nothing after it is computed."""
        seen: list[Tensor] = []

        def take(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen.append(arguments[0].flatten(0, -2).float())
            raise _Taken

        for rows in self._rows:
            with linear.register_forward_pre_hook(take), contextlib.suppress(_Taken):
                self._output(rows)
            yield seen.pop()

    def _output(self, rows: slice) -> Tensor:
        block = self.model.backbone.blocks[self.number]
        part = self.residual[rows]
        state = self.model.new_state(part.shape[0])
        output: Tensor = block.mixer(block.norm(part), state.conv[self.number], state.ssm[self.number])[0]
        return output


class _Taken(Exception):  # noqa: N818 (no error: it ends a computation whose rest is not needed)
    pass
