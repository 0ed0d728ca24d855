"""Making up for a cut: what reads the channels that are left is fitted to give what it gave of all of them.

Cut channels correlate with kept ones, so that least squares over calibration text can put much of what they did into
the weights of the others, as in structured pruning with compensation (Kurtic et al. 2023, ZipLM).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from export.cut import cut_channels
from export.layerwise import Layer
from yunmin.axes import layer_prefix
from yunmin.checkpoint import Checkpoint
from yunmin.model import MambaLM

REFIT = ("x_proj", "out_proj")  # what reads channels, in the order a mixer calls it
_DAMPING = 1e-5  # share of the mean square of inputs: weights of what is never seen stay as they are


@torch.no_grad()
def cut_and_refit(checkpoint: Checkpoint, kept: Sequence[Tensor], sequences: Tensor) -> Checkpoint:
    """The checkpoint with only these inner channels, `x_proj` and `out_proj` fitted to make up for the others.

    Layer by layer, each on what the layers below give once they are cut: first `x_proj`, then `out_proj` on what the
    scan gives with it.

    Args:
        checkpoint: float32; not modified.
        kept: per layer, int64.
        sequences: calibration text as token ids, int64 (S, L). Held are S * L * d numbers.
    """
    cut = cut_channels(checkpoint, kept)
    whole = MambaLM.from_tensors(checkpoint.config, checkpoint.tensors, shares_memory=True)
    narrow = MambaLM.from_tensors(cut.config, cut.tensors)
    tensors = dict(cut.tensors)
    residual = whole.backbone.embeddings(sequences)  # (S, L, d)
    for number in range(cut.config.n_layers):
        before, after = Layer(whole, number, residual), Layer(narrow, number, residual)
        if cut.config.d_inner[number] < checkpoint.config.d_inner[number]:
            for projection in REFIT:
                weight = getattr(narrow.backbone.blocks[number].mixer, projection).weight
                weight += _correction(before, after, projection)
                tensors[f"{layer_prefix(number)}mixer.{projection}.weight"] = weight.detach()
        after.add_outputs()
    return replace(cut, tensors=tensors)


def _correction(before: Layer, after: Layer, projection: str) -> Tensor:
    """What to add to a projection's weight so that its outputs come closest to those before the cut."""
    old, new = (getattr(layer.model.backbone.blocks[layer.number].mixer, projection) for layer in (before, after))
    moments = torch.zeros(new.in_features, new.in_features, dtype=torch.float64)
    missing = torch.zeros(new.in_features, new.out_features, dtype=torch.float64)
    for wide, inputs in zip(before.inputs(old), after.inputs(new), strict=True):
        moments += inputs.T @ inputs
        missing += inputs.T @ (old(wide) - new(inputs))
    moments.diagonal().add_(_DAMPING * moments.diagonal().mean())
    return torch.cholesky_solve(missing, torch.linalg.cholesky(moments)).T.float()
