"""What the three pillars learned, as a checkpoint keeps it: gates, masks, scan order, adapters.

Beside a checkpoint's weights lie `pillars.safetensors` (gate values, weight masks, and what training needs to go on),
`scan_order.npy` with its inverse, and `adapters/lora` and `adapters/ia3` (standard PEFT folders).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from yunmin.axes import PROJECTIONS, expected_shapes, layer_prefix
from yunmin.config import MambaConfig
from yunmin.errors import CheckpointError
from yunmin.files import write_safetensors

PILLARS_FILE = "pillars.safetensors"
SCAN_ORDER_FILE = "scan_order.npy"
SCAN_ORDER_INVERSE_FILE = "scan_order_inv.npy"
ADAPTERS = ("lora", "ia3")


@dataclass(frozen=True)
class Pillars:
    """Gates, masks and scan order of a model with `config`'s widths.

    Attributes:
        channel_gates: per layer, float32 (D,); what multiplies SiLU(conv(x)) once gates are fixed.
        state_gates: per layer, float32 (N,); what multiplies B once gates are fixed.
        scan_order: per layer, int64 (D,); the starting channel at each position.
        weight_masks: element and N:M masks by name of the projection's weight, bool, of its shape.
        training: what training keeps for itself (gate logits, multipliers, temperature, importance), by name.
    """

    channel_gates: tuple[Tensor, ...]
    state_gates: tuple[Tensor, ...]
    scan_order: tuple[Tensor, ...]
    weight_masks: dict[str, Tensor] = field(default_factory=dict)
    training: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def identity(cls, config: MambaConfig) -> Pillars:
        """All gates open, channels in their starting order: a model that was never trained here."""
        return cls(
            tuple(torch.ones(inner) for inner in config.d_inner),
            tuple(torch.ones(n) for n in config.d_state),
            tuple(torch.arange(inner) for inner in config.d_inner),
        )


def save_pillars(folder: Path, pillars: Pillars) -> None:
    """Writes `pillars.safetensors` and the two scan-order files into a checkpoint folder."""
    tensors = {f"channel_gate.{i}": gate for i, gate in enumerate(pillars.channel_gates)}
    tensors |= {f"state_gate.{i}": gate for i, gate in enumerate(pillars.state_gates)}
    tensors |= {f"mask.{name}": mask.to(torch.uint8) for name, mask in pillars.weight_masks.items()}
    tensors |= {f"training.{name}": tensor for name, tensor in pillars.training.items()}
    write_safetensors(folder / PILLARS_FILE, tensors)
    write_scan_order(folder, pillars.scan_order)


def load_pillars(folder: Path, config: MambaConfig) -> Pillars:
    """Reads the pillars beside a checkpoint; a folder without them was never trained here and gets the identity.

    Raises:
        CheckpointError: a file is damaged or does not fit the config; names the layer.
    """
    path = folder / PILLARS_FILE
    if not path.is_file():
        return Pillars.identity(config)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or truncated ({error})") from None

    def gates(kind: str, widths: Sequence[int]) -> tuple[Tensor, ...]:
        for layer, width in enumerate(widths):
            gate = tensors.get(f"{kind}.{layer}")
            found = "nothing" if gate is None else f"{tuple(gate.shape)}"
            if gate is None or tuple(gate.shape) != (width,):
                raise CheckpointError(f"{path}: {kind} of layer {layer}: expected shape ({width},), found {found}")
        return tuple(tensors[f"{kind}.{layer}"] for layer in range(len(widths)))

    masks = {name.removeprefix("mask."): t.bool() for name, t in tensors.items() if name.startswith("mask.")}
    _check_masks(path, config, masks)
    training = {n.removeprefix("training."): t for n, t in tensors.items() if n.startswith("training.")}
    return Pillars(
        gates("channel_gate", config.d_inner),
        gates("state_gate", config.d_state),
        read_scan_order(folder, config),
        masks,
        training,
    )


def write_scan_order(folder: Path, orders: Sequence[Tensor], starting_widths: Sequence[int] | None = None) -> None:
    """Writes `scan_order.npy` and `scan_order_inv.npy`: int64, one row per layer, padded with -1.

    Args:
        folder: of a checkpoint or an artifact.
        orders: per layer, the starting channel at each position.
        starting_widths: per layer, how many channels there were at the start; those that were cut have the inverse -1.
            None where nothing was cut.
    """
    widths = [order.numel() for order in orders] if starting_widths is None else list(starting_widths)
    order_rows = np.full((len(orders), max(order.numel() for order in orders)), -1, dtype=np.int64)
    inverse_rows = np.full((len(orders), max(widths)), -1, dtype=np.int64)
    for layer, order in enumerate(orders):
        order_rows[layer, : order.numel()] = order.numpy()
        inverse_rows[layer, order.numpy()] = np.arange(order.numel())
    np.save(folder / SCAN_ORDER_FILE, order_rows)
    np.save(folder / SCAN_ORDER_INVERSE_FILE, inverse_rows)


def read_scan_order(folder: Path, config: MambaConfig) -> tuple[Tensor, ...]:
    """Reads a checkpoint's `scan_order.npy`.

    Raises:
        CheckpointError: it is missing, damaged, or a row is no permutation of its layer's channels.
    """
    path = folder / SCAN_ORDER_FILE
    try:
        rows = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except (OSError, ValueError, EOFError) as error:
        raise CheckpointError(f"{path}: expected an int64 array, {error}") from None
    if rows.dtype != np.int64 or rows.shape != (config.n_layers, max(config.d_inner)):
        expected = (config.n_layers, max(config.d_inner))
        raise CheckpointError(f"{path}: expected int64 {expected}, found {rows.dtype} {rows.shape}")
    for layer, inner in enumerate(config.d_inner):
        if sorted(rows[layer, :inner].tolist()) != list(range(inner)) or (rows[layer, inner:] != -1).any():
            raise CheckpointError(f"{path}: row {layer} is no permutation of {inner} channels")
    return tuple(torch.from_numpy(rows[layer, :inner].copy()) for layer, inner in enumerate(config.d_inner))


def is_trained_here(folder: Path) -> bool:
    """Whether gates, masks or adapters lie beside a checkpoint's weights."""
    return (folder / PILLARS_FILE).is_file() or bool(adapter_folders(folder))


def adapter_folders(folder: Path) -> dict[str, Path]:
    """The adapters beside a checkpoint: {"lora": ..., "ia3": ...}, those that are there."""
    paths = {name: folder / "adapters" / name for name in ADAPTERS}
    return {name: path for name, path in paths.items() if (path / "adapter_config.json").is_file()}


def _check_masks(path: Path, config: MambaConfig, masks: Mapping[str, Tensor]) -> None:
    shapes = expected_shapes(config)
    maskable = {f"{layer_prefix(i)}mixer.{p}.weight" for i in range(config.n_layers) for p in PROJECTIONS}
    for name, mask in masks.items():
        if name not in maskable:
            raise CheckpointError(f"{path}: mask of {name!r}, which is no projection of this model")
        if tuple(mask.shape) != shapes[name]:
            raise CheckpointError(f"{path}: mask of {name!r}: expected {shapes[name]}, found {tuple(mask.shape)}")
