"""Removing inner channels that were not gated off: approximate, ranked by how much each adds to the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from export.statistics import input_statistics
from export.texts import Text
from yunmin.axes import layer_prefix, take
from yunmin.checkpoint import Checkpoint
from yunmin.model import MambaLM

RANKING = "the mean square of what each adds to the residual stream"


def channel_importance(checkpoint: Checkpoint, text: Text) -> list[Tensor]:
    """Importance of each inner channel, per layer (D,): `RANKING`.

    Args:
        checkpoint: float32.
        text: activations are observed on.
    """
    model = MambaLM.from_tensors(checkpoint.config, checkpoint.tensors)
    statistics = input_statistics(model, text.sequences())
    importance = []
    for layer in range(checkpoint.config.n_layers):
        mixer = f"{layer_prefix(layer)}mixer."
        squares = checkpoint.tensors[f"{mixer}out_proj.weight"].double().square().sum(0)
        importance.append(statistics[f"{mixer}out_proj"].mean_squares * squares)
    return importance


def kept_channels(importance: Sequence[Tensor], width: int) -> list[Tensor]:
    """Per layer, the `width` most important channels (all of a narrower layer) in the order they have, int64."""
    return [values.topk(min(width, values.numel())).indices.sort().values for values in importance]


def cut_channels(checkpoint: Checkpoint, kept: Sequence[Tensor]) -> Checkpoint:
    """The checkpoint with only these inner channels.

    Args:
        checkpoint: float32; not modified.
        kept: per layer, int64.
    """
    config, tensors = checkpoint.config, checkpoint.tensors
    for layer, index in enumerate(kept):
        if index.numel() < config.d_inner[layer] or not torch.equal(index, torch.arange(index.numel())):
            config, tensors = take(config, tensors, "inner", index, layer)
    return replace(checkpoint, config=config, tensors=tensors)
