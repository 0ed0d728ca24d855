"""The torch runtime: every device torch runs on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from yunmin.config import MambaConfig
from yunmin.model import MambaLM
from yunmin.state import MambaState


class TorchRuntime:
    """Runs a `MambaLM` without gradients; see `Runtime` for the methods.

    Args:
        model: on its device, in evaluation mode.
    """

    name = "torch"

    def __init__(self, model: MambaLM) -> None:
        self.model = model

    @property
    def config(self) -> MambaConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def weight_bytes(self) -> int:
        tensors = {t.data_ptr(): t.nbytes for t in (*self.model.parameters(), *self.model.buffers())}
        return sum(tensors.values())

    def new_state(self, batch_size: int) -> MambaState:
        return self.model.new_state(batch_size)

    @torch.inference_mode()
    def prefill(self, token_ids: Sequence[int], state: MambaState | None = None) -> tuple[Tensor, MambaState]:
        ids = torch.tensor([list(token_ids)], dtype=torch.int64, device=self.model.device)  # (1, L)
        logits, state = self.model.prefill(ids, self._here(state))
        return logits[0], state

    @torch.inference_mode()
    def score(self, token_ids: Sequence[int], state: MambaState | None = None) -> tuple[Tensor, MambaState]:
        ids = torch.tensor([list(token_ids)], dtype=torch.int64, device=self.model.device)  # (1, L)
        logits, state = self.model.score(ids, self._here(state))
        return logits[0], state

    @torch.inference_mode()
    def step(self, token_ids: Sequence[int], state: MambaState) -> tuple[Tensor, MambaState]:
        return self.model.step(torch.tensor(list(token_ids), dtype=torch.int64, device=self.model.device), state)

    @torch.inference_mode()
    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids.to(self.model.device))
        return logits

    @torch.inference_mode()
    def gather(self, pool: MambaState, slots: Sequence[int]) -> MambaState:
        return pool.gather(slots)

    @torch.inference_mode()
    def scatter(self, pool: MambaState, slots: Sequence[int], state: MambaState) -> None:
        pool.scatter_(slots, state.to(self.model.device))

    def _here(self, state: MambaState | None) -> MambaState | None:
        return None if state is None else state.to(self.model.device)
