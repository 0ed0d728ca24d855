"""An interrupted and resumed run ends as one that was never interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.runs import interrupt_after, small_run
from training.run import resume, train
from yunmin.errors import CheckpointError, ConfigError, TrainingError

_SPEED = {"tokens_per_second", "peak_memory_bytes"}
# notes of finished phases, which nothing reads again
_NOTES = ("training.scan.0.counters", "training.scan.1.counters")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(small_run(tmp_path_factory.mktemp("whole"))).run


def _metrics(run: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in _SPEED} for line in lines]


def assert_same_checkpoint(one: Path, other: Path) -> None:
    names = sorted(p.relative_to(one) for p in one.rglob("*.safetensors"))
    assert names == sorted(p.relative_to(other) for p in other.rglob("*.safetensors"))
    for name in names:
        ours, theirs = load_file(one / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        different = [key for key in ours if not torch.equal(ours[key], theirs[key]) and key not in _NOTES]
        assert not different, f"{name}: {different}"
    assert (one / "scan_order.npy").read_bytes() == (other / "scan_order.npy").read_bytes()
    assert (one / "trainer.json").read_bytes() == (other / "trainer.json").read_bytes()


# within each phase, and exactly at the end of each
@pytest.mark.parametrize("step", [3, 6, 9, 11, 12, 15, 18, 21])
def test_interrupted_and_resumed_equals_never_interrupted(
    step: int, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(step, patch)
        stopped = train(small_run(tmp_path))
    assert stopped.interrupted
    assert stopped.steps == step
    result = resume(stopped.run)
    assert not result.interrupted
    assert_same_checkpoint(result.checkpoint, uninterrupted / "checkpoint-24")
    assert _metrics(stopped.run) == _metrics(uninterrupted)


def test_a_run_may_be_interrupted_twice(uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (8, 20):
        with monkeypatch.context() as patch:
            interrupt_after(step, patch)
            result = train(small_run(tmp_path)) if step == 8 else resume(tmp_path / "run")
        assert result.steps == step
    assert_same_checkpoint(resume(tmp_path / "run").checkpoint, uninterrupted / "checkpoint-24")


def test_resuming_a_finished_run_changes_nothing(uninterrupted: Path) -> None:
    before = {p: p.read_bytes() for p in uninterrupted.rglob("*") if p.is_file()}
    result = resume(uninterrupted)
    assert (result.steps, result.interrupted) == (24, False)
    assert set(result.validations) == {"dense", "gates", "hard_gates", "recover", "adapters"}
    assert {p: p.read_bytes() for p in uninterrupted.rglob("*") if p.is_file()} == before


def test_metrics_of_steps_after_the_checkpoint_are_cut_off(
    tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(9, patch)
        run = train(small_run(tmp_path)).run
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "kind": "train"}\n{"step": 11, "ki')  # killed while writing
    resume(run)
    assert _metrics(run) == _metrics(uninterrupted)


def test_only_what_a_run_records_may_change(
    tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(4, patch)
        run = train(small_run(tmp_path)).run
    with pytest.raises(ConfigError, match="batch_size: cannot change when a run is resumed"):
        resume(run, ["batch_size=4"])
    result = resume(run, ["keep_checkpoints=1", "log_interval=5"])
    assert [p.name for p in run.glob("checkpoint-*")] == ["checkpoint-24"]
    ours, theirs = (load_file(c / "model.safetensors") for c in (result.checkpoint, uninterrupted / "checkpoint-24"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_changed_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of the text\n" for i in range(400)))
    with monkeypatch.context() as patch:
        interrupt_after(4, patch)
        run = train(small_run(tmp_path, data=str(text), vocab_size=280)).run
    text.write_text("one more line\n" + text.read_text())
    with pytest.raises(TrainingError, match="the training data has changed"):
        resume(run)


def test_what_cannot_be_resumed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"expected a run folder with config\.yaml"):
        resume(tmp_path)
    with monkeypatch.context() as patch:
        interrupt_after(8, patch)
        run = train(small_run(tmp_path)).run
    with pytest.raises(CheckpointError, match="expected the newest checkpoint of the run, which is checkpoint-8"):
        resume(run / "checkpoint-6")
    state = run / "checkpoint-8" / "optimizer.safetensors"
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: missing or damaged"):
        resume(run)
