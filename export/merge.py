"""Merging adapters into weights, with arithmetic of its own: `peft` is what it is verified against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from export.adapter import EMBEDDINGS, Adapter, LoraUpdate
from yunmin.config import MambaConfig


def merge_lora(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W + scale * B A.

    Args:
        weight: W (out, in); its dtype is the one computed in.
        A: (r, in).
        B: (out, r).
        scale: alpha/r, or alpha/sqrt(r).
    """
    return weight + scale * (B.to(weight.dtype) @ A.to(weight.dtype))


def merge_ia3(weight: Tensor, bias: Tensor | None, factors: Tensor, *, on_inputs: bool) -> tuple[Tensor, Tensor | None]:
    """diag(l) W and l*b for factors of the outputs; W diag(l) and b for factors of the inputs.

    Args:
        weight: W (out, in); its dtype is the one computed in.
        bias: b (out,) or None.
        factors: l, (out,) or (in,).
        on_inputs: which of the two.
    """
    factors = factors.to(weight.dtype)
    if on_inputs:
        return weight * factors, bias
    return weight * factors[:, None], None if bias is None else bias * factors


def merge_adapter(
    config: MambaConfig, tensors: Mapping[str, Tensor], adapter: Adapter
) -> tuple[MambaConfig, dict[str, Tensor]]:
    """Merges one adapter into the weights it adapts.

    An adapter of the embedding leaves a head that was tied to it as it was, so the two are two tensors afterwards.

    Args:
        config: describes `tensors`.
        tensors: by name, masks already applied; not modified. Their dtype is the one computed in.
        adapter: read for this model.

    Returns:
        The config (its head untied, where it has to be), and the tensors, all of the same dtype as before.
    """
    merged = dict(tensors)
    if EMBEDDINGS in adapter.updates and config.tie_word_embeddings:
        config = replace(config, tie_word_embeddings=False)
        merged["lm_head.weight"] = merged[f"{EMBEDDINGS}.weight"]
    for module, update in adapter.updates.items():
        weight_name, bias_name = f"{module}.weight", f"{module}.bias"
        if isinstance(update, LoraUpdate):
            merged[weight_name] = merge_lora(merged[weight_name], update.A, update.B, update.scale)
            continue
        weight, bias = merge_ia3(merged[weight_name], merged.get(bias_name), update.factors, on_inputs=update.on_inputs)
        merged[weight_name] = weight
        if bias is not None:
            merged[bias_name] = bias
    return config, merged


def apply_masks(
    config: MambaConfig, tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> tuple[MambaConfig, dict[str, Tensor]]:
    """Zeroes masked weights; comes before any merge, because masks act on the base weight.

    Args:
        config: describes `tensors`.
        tensors: by name; not modified.
        masks: bool, by name of a weight, of its shape; False is zero.
    """
    # not a product, which would keep NaN and give negative zeros
    zeroed = {name: torch.where(mask, tensors[name], 0.0) for name, mask in masks.items()}
    return config, {**tensors, **zeroed}
