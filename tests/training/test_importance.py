"""Importance of projections, and gradients that stay away."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models import random_ids, random_model, small_config
from tests.training.loop import Run, small_run
from training.adapters import allocate
from training.config_file import parse_config
from training.gradients import GradientWatch
from training.importance import ImportanceProbe
from training.phases import Phase
from yunmin.errors import ConfigError, TrainingError


def test_importance_of_a_projection_is_its_output_times_its_gradient() -> None:
    model = random_model(small_config())
    name = "backbone.layers.1.mixer.x_proj"
    module = model.get_submodule(name)
    seen: dict[str, torch.Tensor] = {}

    def keep(_module: object, _inputs: object, output: torch.Tensor) -> None:
        output.retain_grad()
        seen["output"] = output

    handle = module.register_forward_hook(keep)
    ids = random_ids(model.config, 2, 9)
    model(ids).square().mean().backward()
    gradient = seen["output"].grad
    assert gradient is not None
    expected = (seen["output"] * gradient).sum((0, 1)).abs().mean()
    handle.remove()
    with torch.no_grad():
        plain = model(ids)
    probe = ImportanceProbe({name: module})
    probe.attach()
    logits = model(ids)
    assert torch.equal(logits.detach(), plain)  # multiplying by one changes no bit
    logits.square().mean().backward()
    probe.collect()
    assert probe.means()[name] == pytest.approx(float(expected.detach()), rel=1e-4)


def test_allocation_follows_importance_and_spares_masked_projections() -> None:
    names = [f"backbone.layers.{i}.mixer.{p}" for i in range(5) for p in ("in_proj", "out_proj")]
    scores = {name: float(10 - rank) for rank, name in enumerate(names)}
    masked = {names[2]}
    allocation = allocate(
        scores, parse_config({"lora_share": 0.2, "ia3_share": 0.3, "lora_targets": "in_proj"}), masked
    )
    assert allocation.lora == (names[0], names[4])  # out_proj is no LoRA target, names[2] is masked
    assert allocation.ia3 == (names[1], names[2], names[3])
    assert allocation.frozen == tuple(names[5:])


def test_tied_importance_is_told() -> None:
    run = Run(small_run(importance="probability"))
    for phase in Phase:
        run.phase(phase)
    assert any("scores tie" in line for line in run.lines)


@pytest.mark.parametrize("options", [{"enable_masking": False}, {"target_sparsity": 0.0}])
def test_a_measure_of_gates_is_refused_where_there_are_none(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="importance=magnitude is a measure of channel gates, and there are none"):
        small_run(importance="magnitude", **options)


def test_parameter_without_gradient_stops_the_run_by_name() -> None:
    module = torch.nn.Linear(3, 3)
    watch = GradientWatch(module, "dense")
    module.weight.grad = torch.ones(3, 3)
    with pytest.raises(TrainingError, match="'bias' is trainable and has no gradient"):
        watch.check()


def test_gradient_that_stays_zero_stops_the_run_at_the_tenth_step() -> None:
    module = torch.nn.Linear(3, 3)
    watch = GradientWatch(module, "adapters")
    module.weight.grad, module.bias.grad = torch.zeros(3, 3), torch.ones(3)
    for _ in range(9):
        watch.check()
    with pytest.raises(TrainingError, match="gradient of 'weight' was zero for 10 steps"):
        watch.check()
