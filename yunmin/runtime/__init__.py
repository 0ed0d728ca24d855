"""How a model is run: one Protocol, so that engines do not know whether torch, native code or ONNX computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from yunmin.config import MambaConfig
from yunmin.state import MambaState


class Runtime(Protocol):
    """Computes logits and states; knows token ids, not text. Threads may share it."""

    name: str

    @property
    def config(self) -> MambaConfig: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that it computes with; a tied head counts once."""
        ...

    def new_state(self, batch_size: int) -> MambaState:
        """States before the first token; also a pool of slots for `gather` and `scatter`."""
        ...

    def prefill(self, token_ids: Sequence[int], state: MambaState | None = None) -> tuple[Tensor, MambaState]:
        """Reads one sequence: ids (L,), a state of batch size 1 or None -> logits (V,) after the last, and state.

        The state given is not modified.
        """
        ...

    def score(self, token_ids: Sequence[int], state: MambaState | None = None) -> tuple[Tensor, MambaState]:
        """As `prefill`, with the logits after every token: (L, V)."""
        ...

    def step(self, token_ids: Sequence[int], state: MambaState) -> tuple[Tensor, MambaState]:
        """One token for each of B sequences -> logits (B, V) and the next state.

        The call may write the next state over the one given.
        """
        ...

    def forward(self, input_ids: Tensor) -> Tensor:
        """Whole sequences from the empty state: int64 ids (B, L) -> logits (B, L, V)."""
        ...

    def gather(self, pool: MambaState, slots: Sequence[int]) -> MambaState:
        """The states of some slots, as a batch in that order."""
        ...

    def scatter(self, pool: MambaState, slots: Sequence[int], state: MambaState) -> None:
        """Writes a batch's states into slots of the pool."""
        ...
