"""Folding gates into weights, then taking the channels and states that are left, in scan order.

A channel gate m acts on m * SiLU(conv(x)) before `x_proj` and the scan. The scan is linear in its input, so m moves
into the columns of `x_proj` and `out_proj`. A state gate acts on B, which is a block of rows of `x_proj`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from yunmin.axes import layer_prefix, take
from yunmin.config import MambaConfig
from yunmin.errors import CheckpointError
from yunmin.pillars import Pillars


def fold_gates(
    config: MambaConfig, tensors: Mapping[str, Tensor], pillars: Pillars
) -> tuple[MambaConfig, dict[str, Tensor]]:
    """Moves gate values into weights, whatever the values are.

    Args:
        config: describes `tensors`.
        tensors: by name, adapters already merged; not modified. Their dtype is the one computed in.
        pillars: gates of every layer.

    Raises:
        CheckpointError: a gate is not finite; names the layer.
    """
    folded = dict(tensors)
    for layer in range(config.n_layers):
        prefix = f"{layer_prefix(layer)}mixer."
        x_proj, out_proj = folded[f"{prefix}x_proj.weight"], folded[f"{prefix}out_proj.weight"]
        channels = _finite_gate(pillars.channel_gates[layer], layer, "channel").to(x_proj.dtype)  # (D,)
        states = _finite_gate(pillars.state_gates[layer], layer, "state").to(x_proj.dtype)  # (N,)
        if bool((channels == 1).all()) and bool((states == 1).all()):
            continue
        of_rows = torch.cat([states.new_ones(config.dt_rank), states, torch.ones_like(states)])  # (R+2N,)
        folded[f"{prefix}x_proj.weight"] = of_rows[:, None] * x_proj * channels  # (R+2N, D)
        folded[f"{prefix}out_proj.weight"] = out_proj * channels  # (d, D)
    return config, folded


def surviving_channels(pillars: Pillars) -> tuple[Tensor, ...]:
    """Per layer, the starting channels whose gate is not zero, in scan order, int64.

    Raises:
        CheckpointError: a layer would lose every channel; names it.
    """
    survivors = [order[gate[order] != 0] for order, gate in zip(pillars.scan_order, pillars.channel_gates, strict=True)]
    _refuse_empty(survivors, pillars.channel_gates, "inner channels")
    return tuple(survivors)


def surviving_states(pillars: Pillars) -> tuple[Tensor, ...]:
    """Per layer, the state columns whose gate is not zero, ascending, int64.

    Raises:
        CheckpointError: a layer would lose every state; names it.
    """
    survivors = [gate.nonzero().flatten() for gate in pillars.state_gates]
    _refuse_empty(survivors, pillars.state_gates, "states")
    return tuple(survivors)


def take_survivors(
    config: MambaConfig, tensors: Mapping[str, Tensor], channels: Sequence[Tensor], states: Sequence[Tensor]
) -> tuple[MambaConfig, dict[str, Tensor]]:
    """Cuts what is gated off and bakes the scan order, both by one selection per axis.

    Args:
        config: describes `tensors`.
        tensors: by name, gates already folded; not modified.
        channels: per layer, the inner channels to keep, in the order they are to have.
        states: per layer, the state columns to keep.

    Returns:
        The config with the widths that are left, and the tensors.
    """
    taken = dict(tensors)
    for layer in range(config.n_layers):
        if not torch.equal(channels[layer], torch.arange(config.d_inner[layer])):
            config, taken = take(config, taken, "inner", channels[layer], layer)
        if not torch.equal(states[layer], torch.arange(config.d_state[layer])):
            config, taken = take(config, taken, "state", states[layer], layer)
    return config, taken


def _finite_gate(gate: Tensor, layer: int, kind: str) -> Tensor:
    if not bool(gate.isfinite().all()):
        raise CheckpointError(f"layer {layer}: a {kind} gate is not finite")
    return gate


def _refuse_empty(survivors: Sequence[Tensor], gates: Sequence[Tensor], what: str) -> None:
    for layer, (kept, gate) in enumerate(zip(survivors, gates, strict=True)):
        if kept.numel() == 0:
            raise CheckpointError(f"layer {layer}: all {gate.numel()} {what} are gated off, at least one must stay")
