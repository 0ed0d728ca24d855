"""Ranks and first directions of LoRA by the gradients of weights."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from export.pipeline import export
from tests.models import random_ids, random_model, small_config, trained_tokenizer, write_model
from training.adapters import Allocation, inject_adapters, ranks_by_worth
from training.config_file import parse_config
from training.run import train
from training.spectrum import Spectrum, SpectrumProbe
from yunmin.axes import PROJECTIONS
from yunmin.errors import ConfigError
from yunmin.trained import load_trained

NAMES = [f"backbone.layers.{layer}.mixer.{name}" for layer in range(2) for name in PROJECTIONS]
BY_SPECTRUM: dict[str, Any] = {"importance": "spectrum", "importance_steps": 2, "lora_init": "gradient"}


def test_gradients_of_frozen_weights_are_those_of_autograd() -> None:
    model = random_model()
    ids = random_ids(model.config, 4, 9)

    def loss(rows: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    loss(ids).backward()
    expected = {name: model.get_parameter(f"{name}.weight").grad for name in NAMES}
    model.requires_grad_(requires_grad=False)
    exact = model(ids)
    probe = SpectrumProbe({name: model.get_submodule(name) for name in NAMES})
    probe.attach()
    assert torch.equal(model(ids), exact)
    for part in ids.split(2):  # of a batch in two parts
        (loss(part) / 2).backward()
    probe.detach()
    for name, spectrum in probe.spectra().items():
        gradient = expected[name]
        assert gradient is not None
        values = torch.linalg.svdvals(gradient)
        size = sum(gradient.shape)
        torch.testing.assert_close(spectrum.worth, values.square() / size, rtol=1e-3, atol=1e-6 * float(values[0]) ** 2)
        first = spectrum.directions[0]
        torch.testing.assert_close((gradient @ first).norm(), values[0], rtol=1e-3, atol=0.0)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("budget", [60, 77, 100, 148])
def test_ranks_are_worth_as_much_as_any_within_the_budget(budget: int) -> None:
    sizes = {"a": (10, 10), "b": (10, 10), "c": (10, 10)}  # of one size, so that the greedy choice is the best one
    rng = torch.Generator().manual_seed(budget)
    spectra = {n: Spectrum(torch.rand(10, generator=rng).sort(descending=True).values, torch.eye(10)) for n in sizes}
    config = parse_config({**BY_SPECTRUM, "adapter_parameters": budget})
    ranks = ranks_by_worth(sizes, Allocation(("a", "b", "c"), (), ()), config, spectra)

    def worth(candidate: tuple[int, ...]) -> float:
        return sum(float(spectra[name].worth[:rank].sum()) for name, rank in zip(sizes, candidate, strict=True))

    allowed = [c for c in itertools.product(range(1, 11), repeat=3) if 20 * sum(c) <= budget]
    assert worth(tuple(ranks.values())) == pytest.approx(max(map(worth, allowed)))


def test_the_budget_covers_ia3_and_is_that_of_peft_r_where_none_is_given() -> None:
    sizes = {"a": (8, 4), "b": (6, 30)}
    spectra = {"a": Spectrum(torch.arange(4.0, 0.0, -1.0), torch.eye(4, 8))}
    allocation = Allocation(("a",), ("b",), ())
    assert ranks_by_worth(sizes, allocation, parse_config({**BY_SPECTRUM, "peft_r": 3}), spectra) == {"a": 3}
    within = parse_config({**BY_SPECTRUM, "adapter_parameters": 30 + 24})
    assert ranks_by_worth(sizes, allocation, within, spectra) == {"a": 2}
    with pytest.raises(ConfigError, match="is less than the 42 that IA3 on 1"):
        ranks_by_worth(sizes, allocation, parse_config({**BY_SPECTRUM, "adapter_parameters": 41}), spectra)


def test_lora_begins_along_the_gradients_and_changes_nothing_yet() -> None:
    model, plain = random_model(), random_model()
    ids = random_ids(model.config, 2, 7)
    lora = (NAMES[0], NAMES[3])
    inputs = {name: model.get_parameter(f"{name}.weight").shape[1] for name in lora}
    directions = {name: torch.linalg.qr(torch.randn(n, n))[0] for name, n in inputs.items()}
    spectra = {name: Spectrum(torch.ones(n), directions[name]) for name, n in inputs.items()}
    config = parse_config({**BY_SPECTRUM, "importance": "gradient", "peft_r": 2, "peft_dropout": 0.0})
    inject_adapters(model, Allocation(lora, (), ()), config, torch.Generator().manual_seed(0), spectra)
    for name in lora:
        a = model.get_parameter(f"{name}.lora_A.lora.weight")
        torch.testing.assert_close(F.normalize(a, dim=1), directions[name][:2])
    torch.testing.assert_close(model(ids), plain(ids))


def test_a_run_by_spectra_is_exported_as_it_was_trained(tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path / "model", small_config(tie_word_embeddings=True), tokenizer=trained_tokenizer())
    values: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "output_dir": str(tmp_path),
        "run_name": "run",
        "device": "cpu",
        "max_documents": 60,
        "sequence_length": 24,
        "validation_tokens": 120,
        "batch_size": 3,
        "max_steps": 3,
        "dense_share": 0,
        "enable_masking": False,
        "lora_targets": "all",
        "adapter_parameters": 1500,
        "tensorboard": False,
    }
    result = train(parse_config(values | BY_SPECTRUM))
    assert result.trainable_parameters["adapters"] <= 1500
    model, _ = load_trained(result.run)
    ranks = [m.weight.shape[0] for name, m in model.named_modules() if name.endswith("lora_A.lora")]
    assert len(ranks) == 3  # of eight projections, 0.4 of them
    export(result.run, tmp_path / "artifact")  # which compares it with the trained model


@pytest.mark.parametrize(
    ("options", "batches"),
    [
        ({}, 20),
        ({"importance_steps": 2}, 2),
        ({"importance": "gradient"}, 20),
        ({"importance": "gradient", "lora_init": "random"}, 0),
        ({"importance": "gradient", "lora_init": "random", "importance_steps": 2}, 2),
        ({"allocation": "uniform", "lora_init": "random"}, 0),
        ({"allocation": "uniform", "lora_init": "gradient", "importance_steps": 3}, 3),
    ],
)
def test_batches_are_looked_at_where_frozen_weights_decide(options: dict[str, Any], batches: int) -> None:
    assert parse_config(options).importance_batches == batches


def test_a_measure_that_nothing_reads_is_refused() -> None:
    with pytest.raises(ConfigError, match="importance_steps is for allocation=importance"):
        parse_config({"importance_steps": 2, "allocation": "uniform", "lora_init": "random"})
