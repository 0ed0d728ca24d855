"""Where an artifact came from: facts for its manifest, by hash, without paths the user did not type."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.adapter import Adapter
from export.compact import Source
from yunmin import __version__
from yunmin.files import sha256_file
from yunmin.pillars import ADAPTERS

_SOURCE_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "tokenizer.json",
    "pillars.safetensors",
    "scan_order.npy",
)


def provenance_of(source: Source, channels: Sequence[Tensor], probe_origin: str) -> dict[str, Any]:
    """Facts about an export, the same for the same input.

    Args:
        source: that was read.
        channels: per layer, the starting inner channel at each position of the export.
        probe_origin: what it was verified on.
    """
    checkpoint, pillars = source.checkpoint, source.pillars
    reordered = sum(not torch.equal(order, order.sort().values) for order in channels)
    gates = (*pillars.channel_gates, *pillars.state_gates)
    return {
        "yunmin": __version__,
        "source": source.name,
        "checkpoint": checkpoint.folder.name,
        "source_files": {path.name: sha256_file(path) for path in _source_files(checkpoint.folder)},
        "adapters": [_adapter_facts(key, adapter) for key, adapter in source.adapters.items()],
        "gates": {
            "zero": sum(int((gate == 0).sum()) for gate in gates),
            "one": sum(int((gate == 1).sum()) for gate in gates),
            "other": sum(int(((gate != 0) & (gate != 1)).sum()) for gate in gates),
        },
        "masks": {
            "projections": len(pillars.weight_masks),
            "zeroed_weights": sum(int((~mask).sum()) for mask in pillars.weight_masks.values()),
        },
        "reordered_layers": reordered,
        "verified_on": probe_origin,
    }


def _source_files(folder: Path) -> list[Path]:
    return sorted({path for pattern in _SOURCE_FILES for path in folder.glob(pattern) if path.is_file()})


def _adapter_facts(key: str, adapter: Adapter) -> dict[str, Any]:
    # the folder of a checkpoint's own adapter follows from the source
    path = f"adapters/{key}" if key in ADAPTERS else str(adapter.folder)
    return {**adapter.describe(), "path": path}
