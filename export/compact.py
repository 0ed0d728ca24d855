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
        source: not modified.
        dtype: to compute in; the result has it, too.

    Raises:
        CheckpointError: a layer would lose every channel or state, or a gate is not finite.
    """
    config = source.checkpoint.config
    channels, states = surviving_channels(source.pillars), surviving_states(source.pillars)
    tensors = {name: tensor.to(dtype) for name, tensor in source.checkpoint.tensors.items()}
    config, tensors = apply_masks(config, tensors, source.pillars.weight_masks)
    for adapter in source.adapters.values():
        config, tensors = merge_adapter(config, tensors, adapter)
    config, tensors = fold_gates(config, tensors, source.pillars)
    config, tensors = take_survivors(config, tensors, channels, states)
    return Compact(config, tensors, channels, torch.arange(config.d_model))


def trained_model(source: Source) -> MambaLM:
    """The model as it was trained, gates and adapters in place."""
    folders = {name: adapter.folder for name, adapter in source.adapters.items()}
    return build_trained(source.checkpoint, source.pillars, folders)
