"""States as the compiled network keeps them: one stretch of memory per sequence, all layers behind one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from yunmin.config import MambaConfig
from yunmin.runtime.native.records import padded
from yunmin.state import MambaState, require_widths


@dataclass(frozen=True)
class StateLayout:
    """Where the states of each layer lie among the numbers of one sequence.

    Attributes:
        taps: inputs of the convolution that are carried, K-1.
        d_inner, d_state: widths of each layer.
        conv_begin, ssm_begin: per layer, where its states begin: (K-1, D) and (N, D), D padded to vectors.
        numbers: of one sequence.
    """

    taps: int
    d_inner: tuple[int, ...]
    d_state: tuple[int, ...]
    conv_begin: tuple[int, ...]
    ssm_begin: tuple[int, ...]
    numbers: int

    @classmethod
    def of(cls, config: MambaConfig) -> StateLayout:
        """The layout of a model's states."""
        taps = config.d_conv - 1
        conv_begin, ssm_begin, numbers = [], [], 0
        for inner, n in zip(config.d_inner, config.d_state, strict=True):
            conv_begin.append(numbers)
            ssm_begin.append(numbers + taps * padded(inner))
            numbers = ssm_begin[-1] + n * padded(inner)
        return cls(taps, config.d_inner, config.d_state, tuple(conv_begin), tuple(ssm_begin), numbers)


@dataclass(frozen=True)
class NativeState(MambaState):
    """A `MambaState` whose tensors are views of one memory.

    Attributes:
        memory: float32 (B, numbers of one sequence), contiguous.
        layout: of the memory.
    """

    memory: Tensor
    layout: StateLayout

    @classmethod
    def over(cls, layout: StateLayout, memory: Tensor) -> NativeState:
        """The state that lies in `memory` (B, numbers)."""

        def views(begins: Sequence[int], lengths: Sequence[int]) -> tuple[Tensor, ...]:
            found = []
            for begin, length, inner in zip(begins, lengths, layout.d_inner, strict=True):
                wide = padded(inner)
                part = memory[:, begin : begin + length * wide].unflatten(1, (length, wide))  # (B, length, D padded)
                found.append(part[:, :, :inner].transpose(1, 2))  # (B, D, length)
            return tuple(found)

        conv = views(layout.conv_begin, [layout.taps] * len(layout.d_inner))
        return cls(conv, views(layout.ssm_begin, layout.d_state), memory, layout)

    @classmethod
    def empty(cls, layout: StateLayout, batch_size: int) -> NativeState:
        """The state before the first token."""
        return cls.over(layout, torch.zeros(batch_size, layout.numbers, dtype=torch.float32, device="cpu"))

    def copy(self) -> NativeState:
        return self._over(self.memory.clone())

    def gather(self, rows: Sequence[int]) -> NativeState:
        return self._over(self.memory.index_select(0, torch.tensor(list(rows), dtype=torch.int64)))

    def first_rows(self, count: int) -> NativeState:
        return self._over(self.memory[:count])

    def scatter_(self, rows: Sequence[int], source: MambaState) -> None:
        require_fit(self.layout, source)
        if isinstance(source, NativeState):
            self.memory.index_copy_(0, torch.tensor(list(rows), dtype=torch.int64), source.memory)
        else:
            super().scatter_(rows, source)

    def _over(self, memory: Tensor) -> NativeState:
        return NativeState.over(self.layout, memory)

    @classmethod
    def copied(cls, layout: StateLayout, state: MambaState) -> NativeState:
        """A copy of any state of the same widths.

        Raises:
            StateError: it has others.
        """
        require_fit(layout, state)
        if isinstance(state, NativeState):
            return state.copy()
        copy = cls.empty(layout, state.batch_size)
        for mine, theirs in zip(copy.conv + copy.ssm, state.conv + state.ssm, strict=True):
            mine.copy_(theirs)
        return copy


def require_fit(layout: StateLayout, state: MambaState) -> None:
    """Refuses a state of other widths: the compiled network would write beyond its memory.

    Raises:
        StateError: names the first layer that differs.
    """
    if isinstance(state, NativeState) and (state.layout is layout or state.layout == layout):
        return
    require_widths(state, layout.d_inner, layout.d_state, layout.taps)
