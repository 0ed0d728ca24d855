"""The state of running sequences: constant in size, explicit, and movable.

A `MambaState` is what the network carries; a `Snapshot` is what is needed to go on with one sequence elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from yunmin.config import MambaConfig
from yunmin.errors import StateError


@dataclass(frozen=True)
class MambaState:
    """The carried state of a batch of sequences, per layer.

    Attributes:
        conv: last K-1 inputs of the convolution, each (B, D, K-1).
        ssm: state of the scan, each (B, D, N).
    """

    conv: tuple[Tensor, ...]
    ssm: tuple[Tensor, ...]

    @classmethod
    def zeros(
        cls,
        config: MambaConfig,
        batch_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> MambaState:
        """The state before the first token."""
        taps = config.d_conv - 1
        return cls(
            tuple(torch.zeros(batch_size, inner, taps, dtype=dtype, device=device) for inner in config.d_inner),
            tuple(
                torch.zeros(batch_size, inner, n, dtype=dtype, device=device)
                for inner, n in zip(config.d_inner, config.d_state, strict=True)
            ),
        )

    @property
    def batch_size(self) -> int:
        return self.ssm[0].shape[0]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.conv + self.ssm)

    def copy(self) -> MambaState:
        return self._map(Tensor.clone)

    def to(self, device: torch.device | str) -> MambaState:
        """This state on a device."""
        return self._map(lambda t: t.to(device))

    def gather(self, rows: Sequence[int]) -> MambaState:
        """Copies rows of the batch, in the order given; a row may repeat (a fork)."""
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.ssm[0].device)
        return self._map(lambda t: t.index_select(0, index))

    def first_rows(self, count: int) -> MambaState:
        """The first rows of the batch, in the same memory."""
        return self._map(lambda t: t[:count])

    def scatter_(self, rows: Sequence[int], source: MambaState) -> None:
        """Writes `source`'s rows over rows of this state, in place."""
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.ssm[0].device)
        for mine, theirs in zip(self.conv + self.ssm, source.conv + source.ssm, strict=True):
            mine.index_copy_(0, index, theirs)

    def _map(self, function: Callable[[Tensor], Tensor]) -> MambaState:
        return MambaState(tuple(map(function, self.conv)), tuple(map(function, self.ssm)))


def require_widths(state: MambaState, d_inner: Sequence[int], d_state: Sequence[int], taps: int) -> None:
    """Refuses a state of other widths.

    Args:
        state: of any batch size.
        d_inner, d_state: of each layer.
        taps: inputs of the convolution that are carried, K-1.

    Raises:
        StateError: names the first layer that differs.
    """
    layers, batch = len(d_inner), state.batch_size
    if not len(state.conv) == len(state.ssm) == layers:
        raise StateError(f"expected states of {layers} layers, found {len(state.conv)} and {len(state.ssm)}")
    for layer, (inner, n) in enumerate(zip(d_inner, d_state, strict=True)):
        for kind, tensor, numbers in (("conv", state.conv[layer], taps), ("ssm", state.ssm[layer], n)):
            if tensor.shape != (batch, inner, numbers):
                expected, found = (batch, inner, numbers), tuple(tensor.shape)
                raise StateError(f"layer {layer}: expected a {kind} state of shape {expected}, found {found}")


@dataclass(frozen=True)
class Snapshot:
    """One sequence, frozen after its last token.

    Attributes:
        state: of batch size 1.
        logits: after the last token, float32 (V,).
        token_ids: every token so far; penalties, stop strings and detokenization need them.
        sampler_state: of the sampling generator, uint8, or None before any sampling.
    """

    state: MambaState
    logits: Tensor
    token_ids: tuple[int, ...]
    sampler_state: Tensor | None = None
