"""The axes of every tensor, so that cutting, permuting and counting is one function for all of them.

An axis is a tuple of named blocks, because some tensors stack several along one axis: the rows of `in_proj` are the
inner channels of x and then those of z. Names: model (d), inner (D), state (N), rank (R), tap (K), one, vocab.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from yunmin.config import MambaConfig
from yunmin.errors import CheckpointError, ShapeError

Axis = tuple[str, ...]

LAYER_AXES: dict[str, tuple[Axis, ...]] = {
    "norm.weight": (("model",),),
    "mixer.in_proj.weight": (("inner", "inner"), ("model",)),
    "mixer.in_proj.bias": (("inner", "inner"),),
    "mixer.conv1d.weight": (("inner",), ("one",), ("tap",)),
    "mixer.conv1d.bias": (("inner",),),
    "mixer.x_proj.weight": (("rank", "state", "state"), ("inner",)),
    "mixer.dt_proj.weight": (("inner",), ("rank",)),
    "mixer.dt_proj.bias": (("inner",),),
    "mixer.A_log": (("inner",), ("state",)),
    "mixer.D": (("inner",),),
    "mixer.out_proj.weight": (("model",), ("inner",)),
    "mixer.out_proj.bias": (("model",),),
}
MODEL_AXES: dict[str, tuple[Axis, ...]] = {
    "backbone.embeddings.weight": (("vocab",), ("model",)),
    "backbone.norm_f.weight": (("model",),),
    "lm_head.weight": (("vocab",), ("model",)),
}
PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")
_LAYER_NAME = re.compile(r"backbone\.layers\.(\d+)\.(.+)")


def layer_prefix(layer: int) -> str:
    return f"backbone.layers.{layer}."


def axes_of(name: str) -> tuple[int | None, tuple[Axis, ...]]:
    """The layer (None outside the layers) and the axes of a tensor.

    Raises:
        CheckpointError: no such tensor exists in this architecture.
    """
    match = _LAYER_NAME.fullmatch(name)
    if match and match[2] in LAYER_AXES:
        return int(match[1]), LAYER_AXES[match[2]]
    if name in MODEL_AXES:
        return None, MODEL_AXES[name]
    raise CheckpointError(f"unexpected tensor {name!r}")


def block_size(config: MambaConfig, layer: int | None, block: str) -> int:
    """Length of one named block of an axis."""
    match block:
        case "inner" | "state":
            assert layer is not None
            return (config.d_inner if block == "inner" else config.d_state)[layer]
        case "model":
            return config.d_model
        case "rank":
            return config.dt_rank
        case "tap":
            return config.d_conv
        case "vocab":
            return config.vocab_size
        case _:
            return 1


def expected_shapes(config: MambaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model, in file order; a tied head is not listed."""

    def shape(layer: int | None, axes: tuple[Axis, ...]) -> tuple[int, ...]:
        return tuple(sum(block_size(config, layer, block) for block in axis) for axis in axes)

    absent = set()
    if not config.use_bias:
        absent |= {"mixer.in_proj.bias", "mixer.out_proj.bias"}
    if not config.use_conv_bias:
        absent |= {"mixer.conv1d.bias"}
    shapes = {"backbone.embeddings.weight": shape(None, MODEL_AXES["backbone.embeddings.weight"])}
    for layer in range(config.n_layers):
        for name, axes in LAYER_AXES.items():
            if name not in absent:
                shapes[layer_prefix(layer) + name] = shape(layer, axes)
    shapes["backbone.norm_f.weight"] = shape(None, MODEL_AXES["backbone.norm_f.weight"])
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = shape(None, MODEL_AXES["lm_head.weight"])
    return shapes


def take(
    config: MambaConfig, tensors: Mapping[str, Tensor], axis: str, index: Tensor, layer: int | None = None
) -> tuple[MambaConfig, dict[str, Tensor]]:
    """Keeps `index` of a named axis, in that order, in every tensor that has it: a cut, a permutation, or both.

    Args:
        config: describes `tensors`.
        tensors: by name; not modified.
        axis: "inner" or "state" of one layer, or "model" of the whole network.
        index: int64 (n,), positions to keep, without repetition.
        layer: which layer; None for "model".

    Returns:
        The config with the new width, and the tensors.

    Raises:
        ShapeError: the index repeats or leaves the axis.
    """
    if (layer is None) != (axis == "model"):
        raise ShapeError(f"axis {axis!r} needs {'no layer' if axis == 'model' else 'a layer'}, got {layer}")
    width = block_size(config, layer, axis)
    index = index.cpu()
    if index.numel() == 0 or len(set(index.tolist())) != index.numel():
        raise ShapeError(f"{axis} index must be non-empty and without repetition, got {index.numel()} entries")
    if int(index.min()) < 0 or int(index.max()) >= width:
        raise ShapeError(f"{axis} index must lie in 0..{width - 1}, got {int(index.min())}..{int(index.max())}")
    taken: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        owner, axes = axes_of(name)
        if layer is None or owner == layer:
            for dim, blocks in enumerate(axes):
                if axis in blocks:
                    rows = _stacked_index(config, owner, blocks, axis, index)
                    tensor = tensor.index_select(dim, rows.to(tensor.device))
        taken[name] = tensor
    return _with_width(config, axis, index.numel(), layer), taken


def _stacked_index(config: MambaConfig, layer: int | None, blocks: Axis, axis: str, index: Tensor) -> Tensor:
    """Positions along an axis of stacked blocks when `index` is kept of each block named `axis`."""
    parts, offset = [], 0
    for block in blocks:
        size = block_size(config, layer, block)
        parts.append(offset + (index if block == axis else torch.arange(size)))
        offset += size
    return torch.cat(parts)


def _with_width(config: MambaConfig, axis: str, width: int, layer: int | None) -> MambaConfig:
    if layer is None:
        if width != config.d_model:
            raise ShapeError("the model axis can be permuted here, not cut: cutting it changes every norm")
        return config
    widths = list(config.d_inner if axis == "inner" else config.d_state)
    widths[layer] = width
    return config.with_widths(**{f"d_{axis}": widths})
