"""What an export reads, and the exact stages: merging, folding, cutting, ordering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from export.adapter import Adapter, read_adapter, refuse_other_base, refuse_overlaps
from export.fold import fold_gates, surviving_channels, surviving_states, take_survivors
from export.merge import apply_masks, merge_adapter
from yunmin.artifact import is_artifact, read_manifest
from yunmin.axes import layer_prefix
from yunmin.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from yunmin.config import MambaConfig
from yunmin.model import MambaLM
from yunmin.pillars import Pillars, adapter_folders, load_pillars
from yunmin.trained import build_trained


@dataclass(frozen=True)
class Source:
    """Everything an export reads.

    Attributes:
        name: as the user named it.
        checkpoint: weights in their starting order and shape.
        pillars: gates, masks and order beside them.
        adapters: to merge, by the name under which the trained model holds them.
    """

    name: str
    checkpoint: Checkpoint
    pillars: Pillars
    adapters: Mapping[str, Adapter]


@dataclass(frozen=True)
class Compact:
    """What an export makes of it.

    Attributes:
        config: with the widths that are left.
        tensors: merged, folded, cut and ordered.
        channels: per layer, the starting inner channel at each position.
        residual: the starting channel of the residual stream at each position.
    """

    config: MambaConfig
    tensors: dict[str, Tensor]
    channels: tuple[Tensor, ...]
    residual: Tensor

    def cast(self, dtype: torch.dtype) -> Compact:
        return replace(self, tensors={name: tensor.to(dtype) for name, tensor in self.tensors.items()})


def read_source(source: str | Path, adapters: Sequence[str | Path] = ()) -> Source:
    """Reads a checkpoint with its pillars, its adapters and further ones.

    Raises:
        CheckpointError: something is missing, damaged, does not fit, or cannot be merged exactly.
        ArtifactError: it is an artifact that does not match its manifest.
    """
    folder = find_checkpoint(source)
    if is_artifact(folder):
        read_manifest(folder)
    checkpoint = load_checkpoint(folder)
    config = checkpoint.config
    pillars = load_pillars(folder, config)
    folders = {
        **adapter_folders(folder),
        **{f"adapter{number}": Path(path) for number, path in enumerate(adapters)},
    }
    read = {name: read_adapter(path, config) for name, path in folders.items()}
    refuse_overlaps(read.values(), pillars.weight_masks)
    for adapter in read.values():
        refuse_other_base(adapter, checkpoint.tensors)
    return Source(str(source), checkpoint, pillars, read)


def compact_model(source: Source, dtype: torch.dtype = torch.float64) -> Compact:
    """Runs every stage on a source's tensors.

    Args:
        source: not modified; tensors that no stage changes are the very same afterwards.
        dtype: to compute in. Tensors that are computed have it, those that are only cut and ordered stay float32.

    Raises:
        CheckpointError: a layer would lose every channel or state, or a gate is not finite.
    """
    config = source.checkpoint.config
    channels, states = surviving_channels(source.pillars), surviving_states(source.pillars)
    computed = _computed_names(source)
    tensors = {
        name: tensor.to(dtype) if name in computed else tensor for name, tensor in source.checkpoint.tensors.items()
    }
    config, tensors = apply_masks(config, tensors, source.pillars.weight_masks)
    for adapter in source.adapters.values():
        config, tensors = merge_adapter(config, tensors, adapter)
    config, tensors = fold_gates(config, tensors, source.pillars)
    config, tensors = take_survivors(config, tensors, channels, states)
    return Compact(config, tensors, channels, torch.arange(config.d_model))


def compact_config(source: Source) -> MambaConfig:
    """The widths that cutting will leave, known before any work."""
    return source.checkpoint.config.with_widths(
        d_inner=tuple(kept.numel() for kept in surviving_channels(source.pillars)),
        d_state=tuple(kept.numel() for kept in surviving_states(source.pillars)),
    )


def trained_model(source: Source) -> MambaLM:
    """The model as it was trained, gates and adapters in place, on the source's own memory."""
    folders = {name: adapter.folder for name, adapter in source.adapters.items()}
    return build_trained(source.checkpoint, source.pillars, folders, shares_memory=True)


def _computed_names(source: Source) -> set[str]:
    """The tensors that merging and folding do arithmetic on; in the others a float32 value is exact."""
    names = {
        f"{module}.{kind}" for a in source.adapters.values() for module in a.updates for kind in ("weight", "bias")
    }
    pillars = source.pillars
    for layer, gates in enumerate(zip(pillars.channel_gates, pillars.state_gates, strict=True)):
        if not all(bool((gate == 1).all()) for gate in gates):
            names |= {f"{layer_prefix(layer)}mixer.{projection}.weight" for projection in ("x_proj", "out_proj")}
    return names
