"""Merging and folding, each alone, on single layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from export.fold import fold_gates, surviving_channels, surviving_states
from export.merge import apply_masks, merge_ia3, merge_lora
from tests.export.fixtures import random_pillars, small_config
from tests.models import random_tensors
from yunmin.errors import CheckpointError
from yunmin.pillars import Pillars


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_lora_merge_equals_the_low_rank_path() -> None:
    weight, A, B, x = _random(7, 5), _random(3, 5, seed=1), _random(7, 3, seed=2), _random(4, 5, seed=3)
    merged = F.linear(x, merge_lora(weight, A, B, 1.7))
    torch.testing.assert_close(merged, F.linear(x, weight) + 1.7 * F.linear(F.linear(x, A), B), rtol=1e-13, atol=1e-13)


def test_merge_computes_in_the_weights_precision_whatever_the_adapters_is() -> None:
    weight, A, B = _random(7, 5), _random(3, 5, seed=1).bfloat16(), _random(7, 3, seed=2).bfloat16()
    merged = merge_lora(weight, A, B, 0.3)
    assert merged.dtype == torch.float64
    torch.testing.assert_close(merged, weight + 0.3 * (B.double() @ A.double()), rtol=1e-15, atol=1e-15)


def test_ia3_on_outputs_scales_the_bias_too() -> None:
    weight, bias, factors, x = _random(7, 5), _random(7, seed=1), _random(7, seed=2), _random(4, 5, seed=3)
    merged, merged_bias = merge_ia3(weight, bias, factors, on_inputs=False)
    torch.testing.assert_close(
        F.linear(x, merged, merged_bias), factors * F.linear(x, weight, bias), rtol=1e-13, atol=1e-13
    )


def test_ia3_on_inputs_leaves_the_bias() -> None:
    weight, bias, factors, x = _random(7, 5), _random(7, seed=1), _random(5, seed=2), _random(4, 5, seed=3)
    merged, merged_bias = merge_ia3(weight, bias, factors, on_inputs=True)
    torch.testing.assert_close(
        F.linear(x, merged, merged_bias), F.linear(x * factors, weight, bias), rtol=1e-13, atol=1e-13
    )
    assert merged_bias is bias


def test_masked_weights_become_plain_zeros() -> None:
    config, name = small_config(), "backbone.layers.0.mixer.x_proj.weight"
    tensors = random_tensors(config)
    mask = torch.rand(tensors[name].shape, generator=torch.Generator().manual_seed(0)) < 0.5
    _, masked = apply_masks(config, tensors, {name: mask})
    assert torch.equal(masked[name], tensors[name] * mask)
    assert not bool(masked[name][~mask].signbit().any())  # -0.0 would break sparse formats
    assert all(masked[other] is tensor for other, tensor in tensors.items() if other != name)


def test_gates_fold_into_x_proj_and_out_proj_only() -> None:
    config = small_config()
    tensors, pillars = random_tensors(config), random_pillars(config)
    _, folded = fold_gates(config, tensors, pillars)
    for name, tensor in tensors.items():
        changed = name.endswith(("x_proj.weight", "out_proj.weight"))
        assert torch.equal(folded[name], tensor) != changed, name
    m, g = pillars.channel_gates[0], pillars.state_gates[0]
    x = tensors["backbone.layers.0.mixer.x_proj.weight"]
    dt_rows, B_rows, C_rows = folded["backbone.layers.0.mixer.x_proj.weight"].tensor_split([3, 9])
    torch.testing.assert_close(dt_rows, x[:3] * m)
    torch.testing.assert_close(B_rows, x[3:9] * m * g[:, None])
    torch.testing.assert_close(C_rows, x[9:] * m)


def test_layer_without_channels_or_states_is_refused() -> None:
    config = small_config()
    pillars = Pillars.identity(config)
    dead = (torch.ones(32), torch.zeros(32))
    with pytest.raises(CheckpointError, match="layer 1: all 32 inner channels are gated off, at least one must stay"):
        surviving_channels(replace(pillars, channel_gates=dead))
    with pytest.raises(CheckpointError, match="layer 0: all 6 states are gated off, at least one must stay"):
        surviving_states(replace(pillars, state_gates=(torch.zeros(6), torch.ones(6))))


def test_gate_that_is_not_finite_is_refused() -> None:
    config = small_config()
    bad = (torch.ones(32), torch.full((32,), float("nan")))
    with pytest.raises(CheckpointError, match="layer 1: a channel gate is not finite"):
        fold_gates(config, random_tensors(config), replace(Pillars.identity(config), channel_gates=bad))
