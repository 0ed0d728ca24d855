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
from yunmin.errors import CheckpointError
from yunmin.model import MambaLM

RANKING = "the mean square of what each adds to the residual stream"
READERS = ("x_proj", "out_proj")  # of inner channels
_DAMPING = 1e-4  # share of the inputs' mean squares: weights of what is hardly seen stay as they are
_MASKED_FROM = 0.01  # share of zeros among a projection's weights


def observed(checkpoint: Checkpoint, text: Text, *, for_fit: bool = False) -> dict[str, InputStatistics]:
    """What cuts go by: statistics of the inputs of every projection, by module name.

    Args:
        checkpoint: float32.
        text: to observe.
        for_fit: whether there will be fits, for which 2 * D * D float32 numbers of each layer are kept.
    """
    model = MambaLM.from_tensors(checkpoint.config, checkpoint.tensors, shares_memory=True)
    return input_statistics(model, text.sequences(), second_moments=READERS if for_fit else ())


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
        is_gone = torch.ones(checkpoint.config.d_inner[layer], dtype=torch.bool).index_fill(0, index, False)
        for projection in READERS if bool(is_gone.any()) else ():
            name = f"{layer_prefix(layer)}mixer.{projection}"
            weight = checkpoint.tensors[f"{name}.weight"]
            if not _is_masked(weight):
                lost = _regressed(statistics[name], weight.double(), is_gone, index, name)
                tensors[f"{name}.weight"] = tensors[f"{name}.weight"] + lost.float()
    return replace(cut, tensors=tensors)


def fitted_readers(checkpoint: Checkpoint, kept: Sequence[Tensor]) -> tuple[str, ...]:
    """The projections that `cut_and_fit` fits in some layer."""
    cut = [i for i, index in enumerate(kept) if index.numel() < checkpoint.config.d_inner[i]]
    weights = {p: [checkpoint.tensors[f"{layer_prefix(i)}mixer.{p}.weight"] for i in cut] for p in READERS}
    return tuple(projection for projection, of_layers in weights.items() if not all(map(_is_masked, of_layers)))


def _is_masked(weight: Tensor) -> bool:
    """Whether many single weights are zero, which fits would revive; whole columns may be, and a few that underflew."""
    is_zero = weight == 0
    of_columns = is_zero[:, ~is_zero.all(0)]
    return bool(of_columns.sum() > _MASKED_FROM * of_columns.numel())


def _regressed(inputs: InputStatistics, weight: Tensor, gone: Tensor, kept: Tensor, name: str) -> Tensor:
    """What kept channels can give of what a projection read from those that are gone, as weights (_, kept).

    Least squares with damping, more of it where few tokens were seen for each channel.

    Raises:
        CheckpointError: activations are not finite.
    """
    moments = inputs.second_moments
    assert moments is not None
    if not bool(torch.isfinite(moments).all()):
        raise CheckpointError(f"{name}: its inputs on the calibration text are not finite")
    own = moments[kept][:, kept].double()
    share = _DAMPING + kept.numel() / inputs.tokens
    squares = own.diagonal().clone()  # damped by their own and by the median, which outliers leave alone
    own.diagonal().add_((share * (squares + squares.median())).clamp(min=torch.finfo(torch.float32).tiny))
    read = moments[kept][:, gone].double() @ weight[:, gone].T
    return torch.cholesky_solve(read, torch.linalg.cholesky(own)).T
