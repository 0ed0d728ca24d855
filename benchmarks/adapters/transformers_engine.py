"""Hugging Face transformers, whose CPU path is plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.adapters.contract import Setup


class TransformersEngine:
    """See `Engine`. Several tokens are only read from the empty state: its slow path begins every text with zeros."""

    can_continue = False

    def __init__(self, setup: Setup) -> None:
        self.folder = setup.model
        self.versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        torch.set_num_threads(setup.threads)

    def load(self) -> None:
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        self.model: Any = model.eval()

    def start(self, batch_size: int) -> None:  # noqa: ARG002 (its first call makes the cache)
        self.cache: Any = None

    def read(self, token_ids: Sequence[int]) -> None:
        self._forward(torch.tensor([list(token_ids)]))

    def step(self, token_ids: Sequence[int]) -> None:
        self._forward(torch.tensor(list(token_ids))[:, None])

    def logits(self) -> list[float]:
        values: list[float] = self._logits[0].tolist()
        return values

    @torch.inference_mode()
    def _forward(self, ids: Tensor) -> None:
        found = self.model(ids, cache_params=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = found.cache_params
        self._logits: Tensor = found.logits[:, -1]
