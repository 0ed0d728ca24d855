"""Removing inner channels that were not gated off: approximate, ranked by how much each adds to the residual stream.

What reads the channels that are left, `x_proj` and `out_proj`, is fitted by least squares to give what it gave of all:
cut channels correlate with kept ones (structured pruning with compensation, as in ZipLM, Kurtic et al. 2023).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from export.statistics import InputStatistics, input_statistics
from export.texts import Text
from yunmin.axes import layer_prefix, take
from yunmin.checkpoint import Checkpoint
from yunmin.model import MambaLM

RANKING = "the mean square of what each adds to the residual stream"
READERS = ("x_proj", "out_proj")  # of inner channels
_DAMPING = 1e-4  # share of the inputs' mean square: weights of what is hardly seen stay as they are


def observed(checkpoint: Checkpoint, text: Text, *, for_fit: bool = False) -> dict[str, InputStatistics]:
    """What cuts go by: statistics of the inputs of every projection, by module name.

    Args:
        checkpoint: float32.
        text: to observe.
        for_fit: whether there will be fits, which take 2 * D * D numbers of each layer.
    """
    model = MambaLM.from_tensors(checkpoint.config, checkpoint.tensors, shares_memory=True)
    return input_statistics(model, text.sequences(), covariances=READERS if for_fit else ())


def channel_importance(checkpoint: Checkpoint, statistics: Mapping[str, InputStatistics]) -> list[Tensor]:
    """Importance of each inner channel, per layer, float64 (D,): `RANKING`."""
    importance = []
    for layer in range(checkpoint.config.n_layers):
        name = f"{layer_prefix(layer)}mixer.out_proj"
        columns = checkpoint.tensors[f"{name}.weight"].double().square().sum(0)
        importance.append(statistics[name].mean_squares * columns)
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


def cut_and_fit(
    checkpoint: Checkpoint, kept: Sequence[Tensor], statistics: Mapping[str, InputStatistics]
) -> Checkpoint:
    """The checkpoint with only these inner channels, what reads them fitted to make up for the others.

    Args:
        checkpoint: float32; not modified.
        kept: per layer, int64.
        statistics: of the whole checkpoint, `observed(..., for_fit=True)`.
    """
    cut = cut_channels(checkpoint, kept)
    tensors = dict(cut.tensors)
    for layer, index in enumerate(kept):
        is_kept = torch.zeros(checkpoint.config.d_inner[layer], dtype=torch.bool).index_fill(0, index, True)
        for projection in READERS if not bool(is_kept.all()) else ():
            name = f"{layer_prefix(layer)}mixer.{projection}"
            weight = checkpoint.tensors[f"{name}.weight"].double()[:, ~is_kept]
            moments = statistics[name].second_moments()
            tensors[f"{name}.weight"] = (
                tensors[f"{name}.weight"] + (weight @ _regression(moments, ~is_kept, index)).float()
            )
    return replace(cut, tensors=tensors)


def _regression(moments: Tensor, gone: Tensor, kept: Tensor) -> Tensor:
    """How kept channels predict those that are gone, by least squares with damping, float64 (gone, kept)."""
    own = moments[kept][:, kept]
    damping = (_DAMPING * own.diagonal().mean()).clamp(min=torch.finfo(torch.float32).tiny)
    own.diagonal().add_(damping)
    return torch.cholesky_solve(moments[kept][:, gone], torch.linalg.cholesky(own)).T
