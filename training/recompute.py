"""Memory for time: what a mixer computes is computed again in the backward pass, instead of kept until then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from yunmin.gated import GatedMixer

_depth: list[None] = []


def is_recomputing() -> bool:
    """Whether a forward pass is under way that ran before, so that nothing be observed twice."""
    return bool(_depth)


class RecomputedMixer(GatedMixer):
    """A gated mixer of which a training step keeps only the inputs (activation checkpointing, Chen et al. 2016)."""

    def forward(
        self, hidden: Tensor, conv_state: Tensor, ssm_state: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        arguments = (hidden, conv_state, ssm_state, lengths)
        if not torch.is_grad_enabled():
            return super().forward(*arguments)
        result: tuple[Tensor, Tensor, Tensor] = checkpoint(
            super().forward, *arguments, use_reentrant=False, context_fn=_contexts
        )
        return result


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _recomputing()


@contextmanager
def _recomputing() -> Iterator[None]:
    _depth.append(None)
    try:
        yield
    finally:
        _depth.pop()
