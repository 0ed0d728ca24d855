"""Pillar 3's options: who gets adapters, how many numbers train, and training nothing but adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig

from export.pipeline import export
from tests.models import random_ids, random_model, small_config, trained_tokenizer, write_model
from tests.training.runs import interrupt_after
from tests.training.test_resume import assert_same_checkpoint
from training.adapters import Allocation, allocate, inject_adapters, ranks_within
from training.config import TrainingConfig
from training.config_file import parse_config
from training.optimization import moments_of, parameter_groups
from training.phases import Phase
from training.run import resume, train
from yunmin.axes import PROJECTIONS
from yunmin.checkpoint import load_checkpoint
from yunmin.errors import ConfigError
from yunmin.gated import GatedMixer
from yunmin.model import MambaLM
from yunmin.pillars import adapter_folders, load_pillars
from yunmin.trained import load_trained

NAMES = [f"backbone.layers.{layer}.mixer.{name}" for layer in range(2) for name in PROJECTIONS]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return write_model(folder, small_config(tie_word_embeddings=True), tokenizer=trained_tokenizer())


def _only_adapters(folder: Path, checkpoint: Path, **options: Any) -> TrainingConfig:
    """Trains adapters on a checkpoint, and nothing else."""
    values: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "output_dir": str(folder),
        "run_name": "run",
        "device": "cpu",
        "max_documents": 60,
        "sequence_length": 24,
        "validation_tokens": 120,
        "batch_size": 3,
        "max_steps": 6,
        "learning_rate": 3e-3,
        "dense_share": 0,
        "enable_masking": False,
        "importance_steps": 3,
        "peft_r": 3,
        "tensorboard": False,
    }
    return parse_config(values | options)


def _sizes(model: MambaLM) -> dict[str, tuple[int, int]]:
    modules = {name: model.get_submodule(name) for name in NAMES}
    return {name: (m.in_features, m.out_features) for name, m in modules.items()}  # type: ignore[misc]


def _adapter_numbers(model: MambaLM) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n or ".ia3_" in n)


@pytest.mark.parametrize(
    ("given", "members"),
    [
        ("linear", ("in_proj", "out_proj")),
        ("s6", ("x_proj", "dt_proj")),
        ("all", ("in_proj", "x_proj", "dt_proj", "out_proj")),
        (["s6", "in_proj", "x_proj"], ("x_proj", "dt_proj", "in_proj")),
    ],
)
def test_groups_of_projections_have_the_literatures_names(given: object, members: tuple[str, ...]) -> None:
    assert parse_config({"lora_targets": given}).lora_targets == members
    with pytest.raises(ConfigError, match="lora_targets"):
        parse_config({"lora_targets": "conv1d"})


def test_uniform_allocation_is_lora_on_all_targets() -> None:
    config = parse_config({"allocation": "uniform", "lora_targets": "linear", "lora_share": 0.1})
    allocation = allocate(dict.fromkeys(NAMES, 0.0), config, masked={NAMES[0]})
    assert sorted(allocation.lora) == [NAMES[3], NAMES[4], NAMES[7]]
    assert not allocation.ia3


def test_without_lora_all_may_have_ia3() -> None:
    allocation = allocate(dict.fromkeys(NAMES, 0.0), parse_config({"lora_share": 0, "ia3_share": 1}), masked=())
    assert (allocation.lora, sorted(allocation.ia3)) == ((), sorted(NAMES))


@pytest.mark.parametrize("budget", [800, 1000, 1234, 2345, 100_000])
def test_adapters_fill_their_budget_and_never_exceed_it(budget: int) -> None:
    model = random_model(small_config(), mixer=GatedMixer)
    sizes = _sizes(model)
    allocation = Allocation(tuple(NAMES[:5]), tuple(NAMES[5:7]), (NAMES[7],))
    config = parse_config({"adapter_parameters": budget, "peft_alpha": 8, "peft_r": 4})
    ranks = ranks_within(sizes, allocation, config)
    capped = {name for name in ranks if ranks[name] == min(sizes[name])}
    free = [ranks[name] for name in allocation.lora if name not in capped]
    assert free == sorted(free, reverse=True) or max(free) - min(free) <= 1
    inject_adapters(model, allocation, config, torch.Generator())
    count = _adapter_numbers(model)
    assert count <= budget
    if free:
        assert budget - count < max(sum(size) for size in sizes.values())
    for name in allocation.lora:
        module: Any = model.get_submodule(name)
        assert module.r["lora"] == ranks[name]
        assert module.scaling["lora"] == pytest.approx(2.0)


def test_a_budget_below_rank_one_is_refused() -> None:
    sizes = _sizes(random_model(small_config(), mixer=GatedMixer))
    allocation = Allocation((NAMES[0],), (NAMES[1],), ())
    with pytest.raises(ConfigError, match="adapter_parameters: 116 is less than the 117 that IA3 on 1 and LoRA"):
        ranks_within(sizes, allocation, parse_config({"adapter_parameters": 116}))
    assert ranks_within(sizes, allocation, parse_config({"adapter_parameters": 117})) == {NAMES[0]: 1}


def test_only_adapters_train_on_a_checkpoint_whose_channels_are_ordered(checkpoint: Path, tmp_path: Path) -> None:
    result = train(_only_adapters(tmp_path, checkpoint, adapter_parameters=1500))
    assert set(result.validations) == {"adapters"}
    before, after = (load_checkpoint(folder).tensors for folder in (checkpoint, result.checkpoint))
    assert all(torch.equal(before[name], after[name]) for name in before)
    model, _ = load_trained(result.run)
    assert _adapter_numbers(model) == result.trainable_parameters["adapters"] <= 1500
    assert set(adapter_folders(result.checkpoint)) == {"lora", "ia3"}
    orders = load_pillars(result.checkpoint, model.config).scan_order
    assert not any(torch.equal(order, torch.arange(len(order))) for order in orders)


def test_a_stopped_run_of_adapters_continues_exactly(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"allocation": "random", "importance_steps": None, "adapter_parameters": 1500}
    whole = train(_only_adapters(tmp_path / "whole", checkpoint, **options))
    with monkeypatch.context() as patch:
        interrupt_after(3, patch)
        stopped = train(_only_adapters(tmp_path / "stopped", checkpoint, **options))
    assert_same_checkpoint(resume(stopped.run).checkpoint, whole.checkpoint)


def test_measuring_with_frozen_weights_gives_the_gradients_of_training() -> None:
    from tests.training.loop import Run, small_run

    frozen, dense = (
        Run(small_run(enable_masking=False, importance_steps=steps, scan_mode="none")) for steps in (4, None)
    )

    def loss(run: Run) -> torch.Tensor:
        logits = run.model(run.ids[:, :-1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), run.ids[:, 1:].flatten())

    seen: list[bool] = []

    def losses() -> Any:
        for _ in range(4):
            yield [loss(frozen)]
            seen.append(any(p.grad is not None for p in frozen.model.parameters()))

    frozen.adaptive.enter(Phase.ADAPTERS, losses())
    assert seen == [False, False, False]  # no memory for gradients of weights
    dense.adaptive.before_step(1.0)
    loss(dense).backward()
    dense.adaptive.after_backward()
    assert torch.allclose(frozen.adaptive._allotment.probe.scores / 4, dense.adaptive._allotment.probe.scores)
    optimizer = torch.optim.AdamW(parameter_groups(frozen.model, frozen.adaptive.phase, frozen.config))
    assert moments_of(optimizer) == {}


def test_weights_that_train_no_longer_keep_no_gradients() -> None:
    from tests.training.loop import Run, small_run

    run = Run(small_run(enable_masking=False))
    run.phase(Phase.DENSE)
    assert all(p.grad is not None for p in run.model.parameters())
    run.phase(Phase.ADAPTERS, steps=2)
    assert {n for n, p in run.model.named_parameters() if p.grad is not None} == {
        n for n, p in run.model.named_parameters() if ".lora_" in n or ".ia3_" in n
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"enable_masking": False, "dense_share": 0, "importance": "gradient", "lora_init": "random"},
            "to measure importance in, or importance_steps",
        ),
        (
            {"importance_steps": 2, "importance": "magnitude", "lora_init": "random"},
            "importance_steps is for allocation=importance",
        ),
    ],
)
def test_impossible_measures_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(options)


def test_an_export_of_unequal_ranks_computes_what_was_trained(checkpoint: Path, tmp_path: Path) -> None:
    result = train(_only_adapters(tmp_path, checkpoint, adapter_parameters=1500, adapter_learning_rate=0.05))
    config = PeftConfig.from_pretrained(str(result.checkpoint / "adapters" / "lora"))
    assert config.rank_pattern
    export(result.run, tmp_path / "artifact")  # verifies itself against the trained model
    ids = random_ids(small_config(), 2, 9)
    artifact = load_checkpoint(tmp_path / "artifact")
    with torch.no_grad():
        exported = MambaLM.from_tensors(artifact.config, artifact.tensors)(ids)
        assert torch.allclose(exported, load_trained(result.run)[0](ids), atol=1e-4)
