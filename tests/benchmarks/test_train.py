"""What the benchmark of training steps measures and reports; no timing is asserted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.adapters.remote import Failed
from benchmarks.adapters.train_server import _LOADERS, step
from benchmarks.limits import Limits
from benchmarks.models import plain_checkpoint
from benchmarks.train_report import plot_train, train_tables
from benchmarks.training_steps import Size, Steps, TrainPlan, measure_training
from tests.models import random_model
from yunmin.cli import main
from yunmin.errors import RequestError

PLAN = TrainPlan(1, (Size(2, 8), Size(1, 32)), (Size(1, 64),), 8, 2, 1e9, 10, 0)
NAMES = ("ours fp32", "ours bf16", "transformers", "mambapy")
ANSWER = {"seconds": 2.0, "loss": 5.5, "memory_bytes": 1e6}
SECONDS = {"ours fp32": 2.0, "ours bf16": 1.0, "transformers": 80.0, "mambapy": 12.0}
LIMITS = Limits(1, 1e9, {"fp32": 1e9, "bf16": 2e9, "int8": 4e9}, {"read": "", "fp32": "", "bf16": "", "int8": ""})


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A result of scripted processes; mambapy runs out of memory at the longer size."""
    log: list[tuple[str, int]] = []

    class Scripted:
        def __init__(self, module: str, spec: Mapping[str, Any], **options: Any) -> None:
            self.name = {"yunmin": f"ours {spec['products']}"}.get(spec["kind"], spec["kind"])

        def read(self, limit_s: float) -> dict[str, Any]:
            return {"versions": {"scripted": "1"}}

        def ask(self, request: Mapping[str, int], limit_s: float) -> dict[str, Any]:
            log.append((self.name, request["length"]))
            if self.name == "mambapy" and request["length"] == 32:
                raise Failed("took more than 9.0 GB of memory")
            memory = 100e6 if self.name.startswith("ours") else 400e6
            return {"seconds": SECONDS[self.name], "loss": 5.5, "memory_bytes": memory}

        def close(self) -> None:
            pass

    monkeypatch.setattr("benchmarks.training_steps.Remote", Scripted)
    monkeypatch.setattr("benchmarks.training_steps.measure_limits", lambda threads: LIMITS)
    found = measure_training(PLAN, tmp_path, NAMES, model=None, shape="tiny", pythons={})
    return found | {"log": log}


def test_contestants_take_turns_and_the_first_step_is_not_counted(measured: dict[str, Any]) -> None:
    first = [name for name, length in measured["log"] if length == 8]
    assert first == [*NAMES] * 3
    assert measured["sizes"][0]["steps"]["ours fp32"]["samples"] == 2


def test_long_texts_are_spared_transformers_and_the_longest_all_peers(measured: dict[str, Any]) -> None:
    assert {name for name, length in measured["log"] if length == 32} == {"ours fp32", "ours bf16", "mambapy"}
    assert {name for name, length in measured["log"] if length == 64} == {"ours fp32", "ours bf16"}
    assert measured["sizes"][1]["notes"] == {
        "transformers": "its backward is quadratic in the length: given at most 8",
        "mambapy": "took more than 9.0 GB of memory",
    }


def test_tables_give_speed_over_both_peers_and_memory_over_mambapy(measured: dict[str, Any], tmp_path: Path) -> None:
    rows = {" ".join(line.split()) for part in train_tables(measured) for line in part.text().splitlines()}
    assert any(row.startswith("2x8 ours bf16 80.0 12.0 0.25") for row in rows)
    assert any(row.startswith("1x64 ours fp32 – – –") for row in rows)
    assert "mambapy, 1x32: took more than 9.0 GB of memory" in rows
    plot_train(measured, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_limit_is_three_times_the_products_of_a_forward_at_all_positions(
    measured: dict[str, Any], tmp_path: Path
) -> None:
    config = plain_checkpoint(None, "tiny", tmp_path).config
    d, inner, n, rank = config.d_model, config.d_inner[0], config.d_state[0], config.dt_rank
    weights = config.n_layers * (3 * d * inner + inner * (2 * rank + 2 * n)) + config.vocab_size * d
    assert measured["sizes"][0]["limits_s"] == pytest.approx(
        {"fp32": 6 * 16 * weights / 1e9, "bf16": 6 * 16 * weights / 2e9}
    )


@pytest.mark.parametrize("products", ["fp32", "bf16"])
def test_a_step_leaves_the_gradients_of_the_cross_entropy_at_all_positions(products: str) -> None:
    model = random_model()
    answer = step(model, model, products, 300, 0, batch_size=2, length=9)
    ids = torch.randint(0, 300, (2, 10), generator=torch.Generator().manual_seed(9))
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    expected = torch.autograd.grad(loss, model.lm_head.weight)[0]
    found = model.lm_head.weight.grad
    assert found is not None
    assert answer["loss"] == pytest.approx(loss.item(), rel=1e-6 if products == "fp32" else 0.02)
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < (1e-5 if products == "fp32" else 0.1)
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("peer", ["transformers", "mambapy"])
def test_peers_train_on_the_same_loss(tmp_path: Path, peer: str) -> None:
    folder = plain_checkpoint(None, "tiny", tmp_path).folder
    threads = torch.get_num_threads()
    losses = []
    for kind in ("yunmin", peer):
        try:
            model, logits, _ = _LOADERS[kind](str(folder), threads)
        except ImportError as error:
            pytest.skip(f"{error.name} is not installed: pip install 'yunmin[peers]'")
        losses.append(step(model, logits, "fp32", 512, 0, batch_size=2, length=5)["loss"])
        assert all(parameter.grad is not None for parameter in model.parameters())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "MODEL: give a folder, or --shape for random weights of a known size; one of the two"),
        (["--shape", "tiny", "--sizes", "2by8"], "--sizes: expected BATCHxLENGTH, as in 2x256, found '2by8'"),
        (["--shape", "tiny", "--contestants", "jax"], "--contestants: expected some of ours fp32,"),
        (["--shape", "tiny", "--limit", "0"], "--limit: must be >= 1, got 0"),
        (["--shape", "tiny", "--threads", "0"], "--threads: must be >= 1, got 0"),
        (["--shape", "tiny", "--memory-limit", "0"], "--memory-limit: must be > 0, got 0"),
        (["--shape", "tiny", "--contestants", ""], "--contestants: expected some of ours fp32,"),
        (["--shape", "tiny", "--sizes", "", "--alone", ""], "--sizes: expected at least one size"),
    ],
)
def test_impossible_settings_end_with_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["bench", "train", *arguments, "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith(f"yunmin: error: {message}")
    assert not (tmp_path / "out").exists()


def test_a_run_without_any_figure_is_an_error_that_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*arguments: Any, **options: Any) -> None:
        raise Failed("the package 'mambapy' does not import here")

    monkeypatch.setattr("benchmarks.training_steps.Remote", absent)
    monkeypatch.setattr("benchmarks.training_steps.measure_limits", lambda threads: LIMITS)
    with pytest.raises(RequestError, match="none gave a figure: mambapy, 2x8: the package 'mambapy' does not import"):
        measure_training(PLAN, tmp_path, ("mambapy",), model=None, shape="tiny", pythons={})


def test_limits_are_the_best_of_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.training_steps._measure_size", lambda *_: {"ours fp32": Steps([ANSWER])})
    found = iter([LIMITS, replace(LIMITS, flops_per_s={"fp32": 4e9, "bf16": 1e9, "int8": 4e9})])
    monkeypatch.setattr("benchmarks.training_steps.measure_limits", lambda threads: next(found))
    result = measure_training(PLAN, tmp_path, NAMES, model=None, shape="tiny", pythons={})
    assert result["limits"]["flops_per_s"] == {"fp32": 4e9, "bf16": 2e9, "int8": 4e9}
    limits_s = result["sizes"][0]["limits_s"]
    assert limits_s["bf16"] == pytest.approx(2 * limits_s["fp32"])


@pytest.mark.slow
def test_whole_benchmark_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("benchmarks.training_steps.measure_limits", lambda threads: LIMITS)
    argv = ["bench", "train", "--shape", "tiny", "--sizes", "2x8", "--alone", "", "--contestants", "ours fp32"]
    assert main([*argv, "--repeats", "1", "--threads", "1", "--out", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    (size,) = printed["sizes"]
    assert size["steps"]["ours fp32"]["samples"] == 1
    assert size["steps"]["ours fp32"]["memory_mb"] >= 0
    assert size["notes"] == {}
    assert main(["bench", "train", "--report", str(tmp_path / "train.json")]) == 0
    assert "| 2x8 | ours fp32 |" in capsys.readouterr().out
