"""States as the compiled network keeps them: one stretch of memory per sequence, all layers behind one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from yunmin.errors import StateError
from yunmin.runtime.native.records import padded
from yunmin.runtime.native.weights import NativeWeights
from yunmin.state import MambaState


@dataclass(frozen=True)
class NativeState(MambaState):
    """A `MambaState` whose tensors are views of one memory.

    Attributes:
        memory: float32 (B, numbers of one sequence), contiguous.
        weights: of the model, which decide where a layer's states lie.
    """

    memory: Tensor
    weights: NativeWeights

    @classmethod
    def over(cls, weights: NativeWeights, memory: Tensor) -> NativeState:
        """The state that lies in `memory` (B, numbers)."""
        config, taps = weights.config, weights.config.d_conv - 1

        def views(begins: Sequence[int], lengths: Sequence[int]) -> tuple[Tensor, ...]:
            found = []
            for begin, length, inner in zip(begins, lengths, config.d_inner, strict=True):
                wide = padded(inner)
                part = memory[:, begin : begin + length * wide].unflatten(1, (length, wide))  # (B, length, D padded)
                found.append(part[:, :, :inner].transpose(1, 2))  # (B, D, length)
            return tuple(found)

        conv = views(weights.conv_begin, [taps] * config.n_layers)
        return cls(conv, views(weights.ssm_begin, config.d_state), memory, weights)

    @classmethod
    def empty(cls, weights: NativeWeights, batch_size: int) -> NativeState:
        """The state before the first token."""
        return cls.over(weights, torch.zeros(batch_size, weights.state_numbers, dtype=torch.float32, device="cpu"))

    def copy(self) -> NativeState:
        return self._over(self.memory.clone())

    def gather(self, rows: Sequence[int]) -> NativeState:
        return self._over(self.memory.index_select(0, torch.tensor(list(rows), dtype=torch.int64)))

    def scatter_(self, rows: Sequence[int], source: MambaState) -> None:
        require_fit(self.weights, source)
        if isinstance(source, NativeState):
            self.memory.index_copy_(0, torch.tensor(list(rows), dtype=torch.int64), source.memory)
        else:
            super().scatter_(rows, source)

    def _over(self, memory: Tensor) -> NativeState:
        return NativeState.over(self.weights, memory)

    @classmethod
    def copied(cls, weights: NativeWeights, state: MambaState) -> NativeState:
        """A copy of any state of the same widths.

        Raises:
            StateError: it has others.
        """
        require_fit(weights, state)
        if isinstance(state, NativeState):
            return state.copy()
        copy = cls.empty(weights, state.batch_size)
        for mine, theirs in zip(copy.conv + copy.ssm, state.conv + state.ssm, strict=True):
            mine.copy_(theirs)
        return copy


def require_fit(weights: NativeWeights, state: MambaState) -> None:
    """Refuses a state of other widths: the compiled network would write beyond its memory.

    Raises:
        StateError: names the first layer that differs.
    """
    if isinstance(state, NativeState) and state.weights is weights:
        return
    config, batch = weights.config, state.batch_size
    if not len(state.conv) == len(state.ssm) == config.n_layers:
        raise StateError(f"expected states of {config.n_layers} layers, found {len(state.conv)} and {len(state.ssm)}")
    for layer, (inner, n) in enumerate(zip(config.d_inner, config.d_state, strict=True)):
        for kind, tensor, numbers in (("conv", state.conv[layer], config.d_conv - 1), ("ssm", state.ssm[layer], n)):
            if tensor.shape != (batch, inner, numbers):
                expected, found = (batch, inner, numbers), tuple(tensor.shape)
                raise StateError(f"layer {layer}: expected a {kind} state of shape {expected}, found {found}")
