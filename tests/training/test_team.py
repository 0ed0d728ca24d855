"""Two processes train what one trains: as copies and as shards, in all phases; and they take up each other's runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.runs import SMALL, interrupt_after, small_run
from tests.training.team_child import CUT, EQUAL
from training.data import IGNORED, PackedData
from training.parts import parts_of
from training.run import resume, train
from training.team import Team
from yunmin.errors import ConfigError

_LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of `team_child`, and the same ones of one process."""
    folder = tmp_path_factory.mktemp("team")
    train(small_run(folder / "one", **EQUAL))
    train(small_run(folder / "one-cut", **EQUAL | CUT))
    train(small_run(folder / "one-last", **EQUAL, enable_peft=False, recover_share=0))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("alone", "alone-shards"):
            interrupt_after(9, patch)
            train(small_run(folder / name, **EQUAL))
            patch.undo()
    _launch([*_LAUNCH, "-m", "tests.training.team_child", str(folder)])
    return folder


def _launch(command: list[str]) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600, env=_environment())
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}


def _metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _assert_same_run(one: Path, other: Path) -> None:
    """Equal losses, validations and notes; equal checkpoints but for rounding."""
    ours, theirs = _metrics(one), _metrics(other)
    assert [(line["kind"], line["step"]) for line in ours] == [(line["kind"], line["step"]) for line in theirs]
    for mine, its in zip(ours, theirs, strict=True):
        for key in ("loss", "cross_entropy", "regularization", "gradient_norm", "perplexity", "sparsity"):
            if key in mine:
                assert mine[key] == pytest.approx(its[key], rel=2e-3), (mine["step"], key)
        for key in ("tokens", "epoch", "trainable_parameters", "parameters", "notes"):
            assert mine.get(key) == its.get(key), (mine["step"], key)
    checkpoint = max(one.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2])).name
    names = sorted(path.relative_to(one) for path in (one / checkpoint).rglob("*.safetensors"))
    assert names == sorted(path.relative_to(other) for path in (other / checkpoint).rglob("*.safetensors"))
    for name in names:
        first, second = load_file(one / name), load_file(other / name)
        assert {k: t.shape for k, t in first.items()} == {k: t.shape for k, t in second.items()}
        if name.name != "optimizer.safetensors":
            different = [k for k in first if not torch.allclose(first[k].float(), second[k].float(), atol=5e-3)]
            assert not [k for k in different if not k.endswith(".counters")], (
                f"{name}: {different}"
            )  # notes of the past
    assert (one / checkpoint / "scan_order.npy").read_bytes() == (other / checkpoint / "scan_order.npy").read_bytes()
    progress, its = (json.loads((run / checkpoint / "trainer.json").read_text()) for run in (one, other))
    assert progress.pop("validations") == pytest.approx(its.pop("validations"), rel=2e-3)
    assert progress == its


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "team"),
    [
        ("one", "copies"),
        ("one", "shards"),
        ("one-cut", "cut"),
        ("one-cut", "cut-shards"),
        ("one", "alone"),
        ("one", "alone-shards"),
        ("one-last", "last"),
    ],
)
def test_two_processes_train_what_one_trains(one: str, team: str, runs: Path) -> None:
    _assert_same_run(runs / one / "run", runs / team / "run")


@pytest.mark.slow
def test_a_signal_to_any_process_stops_all_and_one_can_go_on(runs: Path) -> None:
    assert (runs / "stopped" / "run" / "checkpoint-8").is_dir()
    resume(runs / "stopped" / "run", ["sharding=auto"])
    _assert_same_run(runs / "one" / "run", runs / "stopped" / "run")


@pytest.mark.slow
def test_accelerate_launches_shards_and_only_the_first_process_writes(tmp_path: Path) -> None:
    values = SMALL | {"output_dir": str(tmp_path), "max_steps": 8}
    arguments = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2"]
    launcher += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    out = _launch([*launcher, "--main_process_port", "0", "-m", "training", *arguments, "--json"])
    assert json.loads(out)["steps"] == 8
    lines = _metrics(tmp_path / "run")
    assert len(lines) == len({(line["kind"], line["step"], line.get("at"), line["phase"]) for line in lines})


@pytest.mark.parametrize(("size", "accumulation", "sequences"), [(1, 1, 5), (2, 1, 5), (2, 2, 5), (3, 2, 4), (4, 1, 1)])
def test_every_sequence_of_a_batch_is_learned_once(size: int, accumulation: int, sequences: int) -> None:
    rng = torch.Generator().manual_seed(0)
    data = PackedData(
        torch.randint(9, (12, 7), generator=rng, dtype=torch.int32),
        torch.rand(12, 7, generator=rng) < 0.6,
        torch.zeros(12, 2, dtype=torch.int32),
    )
    rows = torch.randperm(12, generator=rng)[:sequences]
    parts = [
        part
        for rank in range(size)
        for part in parts_of(data, rows, Team(rank, size), accumulation, torch.device("cpu"))
    ]
    assert len(parts) == size * accumulation
    assert sum(part.share for part in parts) == pytest.approx(1.0)
    inputs, labels = data.batch(rows)
    real = [part for part in parts if part.place.rows]
    assert torch.equal(torch.cat([part.inputs for part in real]), inputs)
    assert torch.equal(torch.cat([part.labels for part in real]), labels)
    assert [part.place.first for part in real] == [sum(p.place.rows for p in real[:i]) for i in range(len(real))]
    for part in parts:
        assert part.share == pytest.approx(float((part.labels != IGNORED).sum() / (labels != IGNORED).sum()))


def test_shards_need_several_processes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sharding: full needs several processes"):
        train(small_run(tmp_path, sharding="full"))
    assert not list(tmp_path.iterdir())
