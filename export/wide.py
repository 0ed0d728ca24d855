"""Networks that exist one module at a time: computed in float64, or from weights made when they are needed.

A model of float32 weights in float64 is twice as large again. Here a module is made when it is called and dropped when
it has answered, so that no more than a layer exists at once; everything else of the network is its own code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from yunmin.memory import release_pages
from yunmin.model import MambaLM

_VOCABULARY_ROWS = 4096  # of the head, computed at once


class OnCall(nn.Module):
    """A module that is made for each call.

    Args:
        make: the module; its parameters are not shared with anything that this changes.
    """

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self._make = make

    def forward(self, *arguments: Any) -> Any:
        module = self._make()
        answer = module(*arguments)
        release_pages(module.parameters())
        return answer


@contextmanager
def releasing_layers(model: MambaLM) -> Iterator[MambaLM]:
    """Within it, each layer's weights leave memory once the layer has answered, if they are mapped from a file."""
    hooks = [
        block.mixer.register_forward_hook(lambda module, *_: release_pages(module.parameters()))
        for block in model.backbone.blocks
    ]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


class _DoubleEmbedding(nn.Module):
    """An embedding whose rows, once looked up, are float64."""

    weight: Tensor

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self._embedding = [embedding]  # no submodule: its weight stays what it is
        self.register_buffer("weight", torch.empty(0, dtype=torch.float64))  # tells the dtype that states have

    def forward(self, ids: Tensor) -> Tensor:
        embedding = self._embedding[0]
        if type(embedding) is nn.Embedding:
            return F.embedding(ids, embedding.weight).double()
        return torch.as_tensor(copy.deepcopy(embedding).double()(ids))  # an adapter computes


class _DoubleHead(nn.Module):
    """A head whose rows are float64 a few thousand at a time."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self._head = [head]

    def forward(self, hidden: Tensor) -> Tensor:
        weight = self._head[0].weight  # (V, d)
        logits = hidden.new_empty(*hidden.shape[:-1], weight.shape[0])
        for first in range(0, weight.shape[0], _VOCABULARY_ROWS):
            rows = slice(first, first + _VOCABULARY_ROWS)
            logits[..., rows] = hidden @ weight[rows].double().T
            release_pages([weight[rows]])
        return logits


def in_float64(model: MambaLM) -> MambaLM:
    """The same function, computed in float64.

    Args:
        model: float32 or wider, gates and adapters in place; taken over, so that it cannot be used by itself any more.
    """

    def double(module: nn.Module) -> OnCall:
        def make() -> nn.Module:
            made = copy.deepcopy(module).double()
            release_pages(module.parameters())
            return made

        return OnCall(make)

    for block in model.backbone.blocks:
        block.norm = double(block.norm)  # type: ignore[assignment]
        block.mixer = double(block.mixer)  # type: ignore[assignment]
    model.backbone.norm_f = double(model.backbone.norm_f)  # type: ignore[assignment]
    embedding, head = model.backbone.embeddings, model.lm_head
    model.backbone.embeddings = _DoubleEmbedding(embedding)  # type: ignore[assignment]
    model.lm_head = _DoubleHead(head)  # type: ignore[assignment]
    return model
