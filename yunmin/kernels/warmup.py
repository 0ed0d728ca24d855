"""Runs every kernel once on a few numbers, which compiles it."""

from __future__ import annotations

from pathlib import Path

import torch

from yunmin.checkpoint import Checkpoint
from yunmin.config import MambaConfig
from yunmin.model import MambaLM
from yunmin.runtime.native.runtime import NativeRuntime
from yunmin.sampler import Sampler, token_logprob
from yunmin.sampling import SamplingParams


def compile_inference() -> None:
    """The native runtime and sampling; one compiled network serves all formats and shapes."""
    model = _tiny_model()
    runtime = NativeRuntime(Checkpoint(model.config, model.tensors(), None, Path()))
    logits, _ = runtime.step([0], runtime.new_state(1))
    Sampler(SamplingParams(), model.config.n_tokens).choose(logits[0])
    token_logprob(logits[0], model.config.n_tokens, 0)


def compile_training() -> None:
    """Convolution and scan with their backward, as training uses them."""
    model = _tiny_model()
    model(torch.zeros(1, 2, dtype=torch.int64)).sum().backward()


def _tiny_model() -> MambaLM:
    return MambaLM.initialized(MambaConfig.create(vocab_size=16, d_model=16, n_layers=1), torch.Generator())
