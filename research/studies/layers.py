"""What the pillars did to each layer of a trained run: sparsity, adapters, and the order of its channels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.statistics import input_statistics
from yunmin.axes import PROJECTIONS, layer_prefix
from yunmin.channel_path import Matrix, correlation_matrix
from yunmin.model import MambaLM
from yunmin.pillars import Pillars, adapter_folders, load_pillars
from yunmin.trained import load_trained

_BATCH = 8


def layer_facts(run: Path, sequences: Tensor) -> dict[str, Any]:
    """Describes the newest checkpoint of a run by layer.

    Args:
        run: the run folder.
        sequences: token ids to observe activations on, int64 (S, L).

    Returns:
        `channel_sparsity`, `state_sparsity` and `weight_sparsity` (shares cut; None where no weight is masked),
        `allocation` (projections, as `LAYER.NAME`, by kind of adapter; None without adapters), and `scan_correlation`:
        of the channels that are kept, the mean |correlation| of neighbours `before` (as they started) and `after` (in
        scan order).
    """
    model, checkpoint = load_trained(run)
    pillars = load_pillars(checkpoint.folder, checkpoint.config)
    layers = range(checkpoint.config.n_layers)
    correlations = _correlations(model, sequences)
    kept = [gate > 0 for gate in pillars.channel_gates]
    started = [gate.nonzero()[:, 0] for gate in kept]
    ordered = [order[gate[order]] for order, gate in zip(pillars.scan_order, kept, strict=True)]
    return {
        "channel_sparsity": [float((gate == 0).float().mean()) for gate in pillars.channel_gates],
        "state_sparsity": [float((gate == 0).float().mean()) for gate in pillars.state_gates],
        "weight_sparsity": _weight_sparsity(pillars, checkpoint.config.n_layers),
        "allocation": _allocation(checkpoint.folder, checkpoint.config.n_layers),
        "scan_correlation": {
            "before": [neighbour_correlation(correlations[i], started[i]) for i in layers],
            "after": [neighbour_correlation(correlations[i], ordered[i]) for i in layers],
        },
    }


def neighbour_correlation(correlation: Matrix, order: Tensor) -> float:
    """Mean |correlation| of channels that are neighbours in an order, given all correlations (D, D)."""
    positions = order.numpy()
    return float(np.abs(correlation[positions[:-1], positions[1:]]).mean())


def _correlations(model: MambaLM, sequences: Tensor) -> list[Matrix]:
    found = input_statistics(model, sequences[:_BATCH], second_moments=("x_proj",))
    matrices = []
    for layer in range(model.config.n_layers):
        statistics = found[f"{layer_prefix(layer)}mixer.x_proj"]
        matrices.append(correlation_matrix(statistics.mean, statistics.covariance()))
    return matrices


def _weight_sparsity(pillars: Pillars, n_layers: int) -> list[float] | None:
    if not pillars.weight_masks:
        return None
    by_layer: list[list[Tensor]] = [[] for _ in range(n_layers)]
    for name, mask in pillars.weight_masks.items():
        by_layer[int(name.split(".")[2])].append(mask.flatten())
    return [float((~torch.cat(masks)).float().mean()) if masks else 0.0 for masks in by_layer]


def _allocation(folder: Path, n_layers: int) -> dict[str, list[str]] | None:
    adapters = adapter_folders(folder)
    if not adapters:
        return None
    given: dict[str, list[str]] = {"lora": [], "ia3": []}
    for name, path in adapters.items():
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        given[name] = sorted(f"{t.split('.')[-3]}.{t.split('.')[-1]}" for t in config["target_modules"])
    everything = [f"{layer}.{projection}" for layer in range(n_layers) for projection in PROJECTIONS]
    frozen = [name for name in everything if name not in given["lora"] and name not in given["ia3"]]
    return {**given, "frozen": frozen}
