"""One table of axes does all cutting, permuting and counting."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.models import hf_model, random_ids, random_model, random_pillars, random_tensors, small_config
from yunmin.axes import axes_of, expected_shapes, take
from yunmin.config import MambaConfig
from yunmin.cost import cost_of
from yunmin.errors import CheckpointError, ShapeError
from yunmin.gated import GatedMixer
from yunmin.model import MambaLM
from yunmin.trained import set_fixed_gates

CONFIGS = {
    "untied": small_config(),
    "tied": small_config(tie_word_embeddings=True),
    "no_biases": small_config(use_bias=False, use_conv_bias=False),
    "ragged": small_config(d_inner=(40, 24), d_state=(5, 8)),
}


def permutation(width: int, seed: int) -> Tensor:
    return torch.randperm(width, generator=torch.Generator().manual_seed(seed))


def logits_of(config: MambaConfig, tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
    with torch.no_grad():
        return MambaLM.from_tensors(config, tensors)(ids)


@pytest.mark.parametrize("name", CONFIGS)
def test_permuting_inner_state_and_model_channels_changes_no_logit(name: str) -> None:
    config = CONFIGS[name]
    tensors = random_tensors(config, dtype=torch.float64)
    ids = random_ids(config, 2, 9)
    expected = logits_of(config, tensors, ids)
    permuted_config, permuted = config, tensors
    for layer in range(config.n_layers):
        inner, state = permutation(config.d_inner[layer], layer), permutation(config.d_state[layer], layer + 9)
        permuted_config, permuted = take(permuted_config, permuted, "inner", inner, layer)
        permuted_config, permuted = take(permuted_config, permuted, "state", state, layer)
    permuted_config, permuted = take(permuted_config, permuted, "model", permutation(config.d_model, 5))
    assert permuted_config == config
    assert not any(torch.equal(permuted[n], tensors[n]) for n in tensors)
    torch.testing.assert_close(logits_of(config, permuted, ids), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_permuted_model_has_permuted_states(name: str) -> None:
    config = CONFIGS[name]
    tensors = random_tensors(config, dtype=torch.float64)
    inner, columns = permutation(config.d_inner[1], 3), permutation(config.d_state[1], 4)
    _, permuted = take(config, take(config, tensors, "inner", inner, 1)[1], "state", columns, 1)
    ids = random_ids(config, 2, 9)
    with torch.no_grad():
        _, state = MambaLM.from_tensors(config, tensors).prefill(ids)
        _, mine = MambaLM.from_tensors(config, permuted).prefill(ids)
    torch.testing.assert_close(mine.ssm[1], state.ssm[1][:, inner][:, :, columns], rtol=0, atol=1e-12)
    torch.testing.assert_close(mine.conv[1], state.conv[1][:, inner], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_cut_model_equals_the_model_with_its_gates(name: str) -> None:
    config = CONFIGS[name]
    tensors = random_tensors(config, dtype=torch.float64)
    pillars = random_pillars(config)
    gated = MambaLM.from_tensors(config, tensors, mixer=GatedMixer)
    set_fixed_gates(gated, pillars)
    ids = random_ids(config, 2, 9)
    with torch.no_grad():
        expected = gated(ids)
        assert (expected - logits_of(config, tensors, ids)).abs().max() > 0.1
    cut_config, cut = config, dict(tensors)
    for layer in range(config.n_layers):
        prefix = f"backbone.layers.{layer}.mixer."
        channels, states = (g[layer].double() for g in (pillars.channel_gates, pillars.state_gates))
        assert set(channels.tolist()) - {0.0, 1.0}
        cut[prefix + "x_proj.weight"] = cut[prefix + "x_proj.weight"] * channels
        rows = cut[prefix + "x_proj.weight"].clone()
        rank, n = config.dt_rank, config.d_state[layer]
        rows[rank : rank + n] *= states[:, None]
        cut[prefix + "x_proj.weight"] = rows
        # the scan is linear in its input, and the skip sees it, too
        cut[prefix + "out_proj.weight"] = cut[prefix + "out_proj.weight"] * channels
        cut_config, cut = take(cut_config, cut, "inner", channels.nonzero()[:, 0], layer)
        cut_config, cut = take(cut_config, cut, "state", states.nonzero()[:, 0], layer)
    assert cost_of(cut_config).parameters == sum(t.numel() for t in cut.values()) < cost_of(config).parameters
    torch.testing.assert_close(logits_of(cut_config, cut, ids), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_expected_shapes_are_those_of_the_model(name: str) -> None:
    config = CONFIGS[name]
    model = random_model(config)
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    assert expected_shapes(config) == shapes
    assert cost_of(config).parameters == sum(p.numel() for p in model.parameters())
    state = model.new_state(1)
    assert cost_of(config).state_bytes == state.nbytes == 4 * sum(t.numel() for t in state.conv + state.ssm)
    for tensor_name, shape in shapes.items():
        assert len(axes_of(tensor_name)[1]) == len(shape)


@pytest.mark.parametrize("options", [{}, {"use_bias": True, "tie_word_embeddings": False}, {"use_conv_bias": False}])
def test_expected_shapes_are_those_of_transformers(options: dict[str, bool]) -> None:
    theirs = hf_model(**options)
    config = MambaConfig.from_dict(theirs.config.to_dict())
    shapes = {n: tuple(p.shape) for n, p in theirs.named_parameters()}
    assert expected_shapes(config) == shapes
    assert cost_of(config).parameters == sum(p.numel() for p in theirs.parameters())
    assert cost_of(config).weight_bytes == 4 * cost_of(config).parameters


def test_a_channel_and_a_state_cost_what_the_design_says() -> None:
    config = small_config(use_bias=False)
    d, rank, taps, n, inner = 24, 3, 4, 5, 40

    def parameters(inner_0: int, n_0: int) -> int:
        return cost_of(config.with_widths(d_inner=(inner_0, inner), d_state=(n_0, n))).parameters

    assert parameters(inner, n) - parameters(inner - 1, n) == 3 * d + 2 * rank + 3 * n + taps + 3
    assert parameters(inner, n) - parameters(inner, n - 1) == 3 * inner


def test_flops_are_dominated_by_twice_the_matrix_weights() -> None:
    config = MambaConfig.create(vocab_size=1000, d_model=256, n_layers=4)
    matrices = sum(math.prod(s) for n, s in expected_shapes(config).items() if n.endswith("weight") and len(s) == 2)
    assert 2 * matrices < cost_of(config).flops_per_token < 2.3 * matrices


@pytest.mark.parametrize(
    ("axis", "index", "layer", "named"),
    [
        ("inner", [0, 0], 0, "without repetition"),
        ("inner", [], 0, "non-empty"),
        ("inner", [40], 0, r"must lie in 0\.\.39, got 40"),
        ("state", [-1, 0], 1, r"must lie in 0\.\.4, got -1"),
        ("inner", [0], None, "needs a layer"),
        ("model", [0], 0, "needs no layer"),
        ("model", [0, 1], None, "can be permuted here, not cut"),
    ],
)
def test_an_impossible_index_is_refused(axis: str, index: list[int], layer: int | None, named: str) -> None:
    config = small_config()
    with pytest.raises(ShapeError, match=named):
        take(config, random_tensors(config), axis, torch.tensor(index, dtype=torch.int64), layer)


def test_take_modifies_nothing_and_refuses_unknown_tensors() -> None:
    config = small_config()
    tensors = random_tensors(config)
    kept = {n: t.clone() for n, t in tensors.items()}
    take(config, tensors, "inner", torch.arange(7), 0)
    assert all(torch.equal(tensors[n], kept[n]) for n in kept)
    with pytest.raises(CheckpointError, match=r"unexpected tensor 'backbone\.layers\.0\.mixer\.E'"):
        take(config, {"backbone.layers.0.mixer.E": torch.zeros(3)}, "inner", torch.arange(7), 0)
