"""Scan orders while a model trains: what they are solved from and for, and when they may change."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.models import random_model
from tests.training.loop import Run, small_run
from training.gating import mixers_of
from training.observation import ScanOrders
from training.phases import Phase
from yunmin.errors import ConfigError
from yunmin.gated import GatedMixer
from yunmin.n_of_m_order import retained_magnitude


def test_order_updates_happen_while_gates_are_learned() -> None:
    run = Run(small_run())
    run.phase(Phase.DENSE)
    run.adaptive.enter(Phase.GATES, ([run.loss()] for _ in itertools.count()))
    started = run.adaptive.scan_order
    run.steps(12)
    assert any(not torch.equal(a, b) for a, b in zip(started, run.adaptive.scan_order, strict=True))


def test_orders_are_closed_once_gates_are_fixed() -> None:
    run = Run(small_run())
    for phase in (Phase.DENSE, Phase.GATES, Phase.RECOVER):
        run.phase(phase)
    orders = run.adaptive.scan_order
    run.phase(Phase.ADAPTERS)
    assert all(torch.equal(a, b) for a, b in zip(orders, run.adaptive.scan_order, strict=True))
    assert all(mixer.observe is None for mixer in mixers_of(run.model))


@pytest.mark.parametrize(
    ("options", "objective"),
    [
        ({}, "quantization"),
        ({"weight_mask": "n:m"}, "n:m"),
        ({"weight_mask": "n:m", "enable_masking": False}, "quantization"),
        ({"weight_mask": "n:m", "mask_targets": "in_proj"}, "quantization"),
        ({"channel_gates": "block"}, "saliency"),
        ({"channel_gates": "block", "weight_mask": "n:m"}, "n:m"),
        ({"channel_gates": "block", "scan_objective": "correlation"}, "correlation"),
    ],
)
def test_orders_are_solved_for_what_the_masks_need(options: dict[str, Any], objective: str) -> None:
    assert small_run(**options).order_objective == objective


def test_a_saliency_order_sorts_by_what_channels_add_to_the_output() -> None:
    run = Run(small_run(scan_objective="saliency", scan_mode="static"))
    seen: dict[int, torch.Tensor] = {}
    for layer, mixer in enumerate(mixers_of(run.model)):
        mixer.out_proj.register_forward_pre_hook(lambda _, inputs, layer=layer: seen.update({layer: inputs[0]}))
    orders = ScanOrders(run.model, run.config, torch.Generator())
    orders.observe(wanted=True)
    run.model(run.ids)
    orders.update()
    assert orders.solve() == list(range(run.model.config.n_layers))
    for layer, order in enumerate(orders.orders):
        out_proj = mixers_of(run.model)[layer].out_proj.weight
        added = seen[layer].square().mean((0, 1)) * out_proj.square().sum(0)
        assert torch.equal(order, torch.argsort(added, descending=True))


def test_gradients_weigh_nothing_but_correlations() -> None:
    with pytest.raises(ConfigError, match="it needs scan_objective=correlation"):
        small_run(scan_gradient_weighted=True)


def test_groups_of_masks_form_among_the_channels_that_are_kept() -> None:
    config = small_run(scan_objective="n:m", weight_mask="n:m", channel_gates="channel", channel_multiple=8)
    model = random_model(mixer=GatedMixer)
    orders = ScanOrders(model, config, torch.Generator())
    gates = [(torch.arange(d) % 2).float() for d in model.config.d_inner]
    assert orders.solve_among(gates) == list(range(model.config.n_layers))
    for layer, order in enumerate(orders.orders):
        half = order.numel() // 2
        assert gates[layer][order].tolist() == [1.0] * half + [0.0] * half
        weight = model.get_parameter(f"backbone.layers.{layer}.mixer.out_proj.weight").detach()
        assert retained_magnitude(weight[:, order[:half]], 2, 4) > retained_magnitude(weight[:, gates[layer] > 0], 2, 4)
    assert orders.solve_among([torch.ones(d) for d in model.config.d_inner]) == []


def test_scales_are_shared_among_the_channels_that_are_kept() -> None:
    run = Run(small_run())
    orders = ScanOrders(run.model, run.config, torch.Generator())
    gates = [(torch.arange(d) % 2).float() for d in run.model.config.d_inner]
    orders.observe(wanted=True)
    run.model(run.ids)
    orders.update()
    orders.solve()
    saved = orders.tensors()
    assert orders.solve_among(gates) == list(range(run.model.config.n_layers))
    for layer, order in enumerate(orders.orders):
        half = order.numel() // 2
        assert gates[layer][order].tolist() == [1.0] * half + [0.0] * half
    again = ScanOrders(run.model, run.config, torch.Generator())
    again.load_tensors(saved)
    again.solve_among(gates)
    assert all(torch.equal(a, b) for a, b in zip(again.orders, orders.orders, strict=True))


@pytest.mark.parametrize("start", ["activation", "equal"])
def test_blocks_that_are_learned_from_the_start_form_in_an_order_of_what_channels_carry(start: str) -> None:
    options = {"scan_objective": "saliency", "dense_share": 0, "scan_update_frequency": 2, "gate_start": start}
    run = Run(small_run(channel_gates="block", **options))
    run.phase(Phase.GATES, steps=0)
    assert run.lines == ["scan order updated in layers 0, 1"]
    order = run.adaptive.scan_order
    assert not torch.equal(order[0], torch.arange(40))
    logits = run.adaptive.pillars().training["logits.channel.0"]
    if start == "activation":
        assert torch.equal(logits.argsort(descending=True), torch.arange(5))  # the first blocks carry most
    run.steps(6)
    assert all(torch.equal(a, b) for a, b in zip(order, run.adaptive.scan_order, strict=True))  # closed gates hide
