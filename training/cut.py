"""Pillar 2: the exact cut at the end of the gate phase, from one score for each unit, however it was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from training.config import TrainingConfig
from training.masks import element_mask, n_of_m_mask
from training.sparsity import best_units, kept_channels, kept_states, shared_counts
from yunmin.config import MambaConfig
from yunmin.errors import ConfigError


def gate_block(config: TrainingConfig) -> int:
    """Channels that are kept or cut together."""
    return config.gate_block_size if config.channel_gates == "block" else 1


def check_widths(model: MambaConfig, config: TrainingConfig) -> None:
    """Checks that every layer can be cut, masked and ordered as configured.

    Raises:
        ConfigError: blocks, multiples or N:M groups do not fit the layers' widths.
    """
    if config.enable_masking:
        _check_cut(model, config)
    masked = config.mask_targets if config.enable_masking and config.weight_mask == "n:m" else ()
    ordered = ("out_proj",) if config.scan_mode != "none" and config.order_objective == "n:m" else ()
    for target in (*masked, *ordered):
        for columns in _columns(model, config, target):
            if columns % config.mask_m:
                raise ConfigError(f"mask_m: {config.mask_m} does not divide the {columns} input channels of {target}")


def _check_cut(model: MambaConfig, config: TrainingConfig) -> None:
    block = gate_block(config)
    if config.channel_multiple % block:
        raise ConfigError(f"channel_multiple: must be a multiple of gate_block_size {block}")
    for width in model.d_inner:
        if config.target_sparsity > 0:
            kept_channels(width, config.target_sparsity, config.channel_multiple)
        if width % block:
            raise ConfigError(f"gate_block_size: must divide the inner width {width}, got {block}")


def _columns(model: MambaConfig, config: TrainingConfig, target: str) -> list[int]:
    """How many inputs a projection may have, before the cut and after it; where gates decide, what that divides."""
    if target in ("in_proj", "dt_proj"):
        return [model.d_model if target == "in_proj" else model.dt_rank]
    widths = list(model.d_inner)
    if not config.enable_masking or config.target_sparsity == 0:
        return widths
    if not config.uniform_widths:
        return [*widths, config.channel_multiple]
    return widths + [kept_channels(width, config.target_sparsity, config.channel_multiple) for width in model.d_inner]


def choose_channels(model: MambaConfig, config: TrainingConfig, scores: Sequence[Tensor]) -> list[Tensor]:
    """The channels, or blocks of them, to keep: bool, per layer.

    Args:
        model: before the cut.
        config: target, multiple and whether widths are uniform.
        scores: per layer, one for each channel or block.
    """
    block = gate_block(config)
    if config.target_sparsity == 0:  # also of widths that are no multiples
        return [torch.ones_like(score, dtype=torch.bool) for score in scores]
    if config.uniform_widths:
        counts = [
            kept_channels(width, config.target_sparsity, config.channel_multiple) // block for width in model.d_inner
        ]
    else:
        counts = shared_counts(scores, config.target_sparsity, config.channel_multiple // block)
    return best_units(scores, counts)


def choose_states(model: MambaConfig, config: TrainingConfig, scores: Sequence[Tensor]) -> list[Tensor]:
    """The states to keep: bool (N,), per layer."""
    return best_units(scores, [kept_states(n, config.target_state_sparsity) for n in model.d_state])


def exact_masks(
    model: MambaConfig,
    config: TrainingConfig,
    scores: Mapping[str, Tensor],
    channels: Sequence[Tensor],
    states: Sequence[Tensor],
    scan_order: Sequence[Tensor],
) -> dict[str, Tensor]:
    """Weight masks by weight name; scores by the names of the projections, the rest as in `exact_mask`."""
    return {
        f"{name}.weight": exact_mask(model, config, name, of_weights, channels, states, scan_order)
        for name, of_weights in scores.items()
    }


def exact_mask(
    model: MambaConfig,
    config: TrainingConfig,
    name: str,
    scores: Tensor,
    channels: Sequence[Tensor],
    states: Sequence[Tensor],
    scan_order: Sequence[Tensor],
) -> Tensor:
    """The weight mask of one projection among what the cut leaves, bool of the weight's shape.

    Args:
        model: before the cut.
        config: kind of mask, and how much it keeps.
        name: of the projection's module.
        scores: of its weights (out, in).
        channels: final channel gates (D,), per layer.
        states: final state gates (N,), per layer.
        scan_order: per layer, int64 (D,); neighbours in it form N:M groups.
    """
    layer, target = int(name.split(".")[2]), name.rpartition(".")[2]
    order = scan_order[layer]
    inner = order[channels[layer][order] > 0]  # survivors in scan order
    kept_n = states[layer].nonzero()[:, 0]
    rank, n, width = model.dt_rank, states[layer].numel(), order.numel()
    rows_and_columns = {
        "in_proj": (torch.cat([inner, width + inner]), torch.arange(model.d_model)),
        "x_proj": (torch.cat([torch.arange(rank), rank + kept_n, rank + n + kept_n]), inner),
        "dt_proj": (inner, torch.arange(rank)),
        "out_proj": (torch.arange(model.d_model), inner),
    }
    rows, columns = rows_and_columns[target]
    if config.weight_mask == "n:m":
        return n_of_m_mask(scores, config.mask_n, config.mask_m, rows, columns)
    return element_mask(scores, config.mask_sparsity, rows, columns)
