"""Real experiments, done here, in processes beside this one, and on a Ray cluster: with the same results."""

from __future__ import annotations

import itertools
import multiprocessing
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from research.ablation.grid import Setting, distinct, planned
from research.ablation.recipes import Recipes
from research.ablation.report import write_report
from research.ablation.study import Runner, Study
from research.ablation.trackers import Trackers
from research.studies.experiments import Experiment, Laboratory
from research.studies.jobs import Done, Job, run_here
from research.studies.progress import Progress
from research.studies.ray_runner import moved, pack, run_on_ray, unpack
from research.studies.workers import run_in_workers
from tests.research.ablation.fakes import tiny_recipes
from training.checkpointing import checkpoints_of

MEASURED = ("key", "validation_perplexity", "test", "int4", "cost", "adapted_parameters", "layers")


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Recipes:
    return tiny_recipes(tmp_path_factory.mktemp("texts"), seeds=1)


@pytest.fixture(scope="module")
def settings(recipes: Recipes) -> list[Setting]:
    """Three combinations."""
    own = distinct(planned(recipes.settings.grid, [0]))
    return [next(s for s in own if s.combination == name) for name in ("baseline", "scan+peft", "all")]


def study_of(recipes: Recipes, folder: Path, runner: Runner) -> Study:
    return Study(recipes, folder, runner, Trackers(folder, "x", tensorboard=False, wandb=False))


@pytest.fixture(scope="module")
def whole(recipes: Recipes, settings: list[Setting], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What they give when done in this process."""
    study = study_of(recipes, tmp_path_factory.mktemp("here"), run_here)
    with Progress() as progress:
        return study.with_latencies(study.perform(settings, progress), progress.line)


def measured_of(result: dict[str, Any]) -> dict[str, Any]:
    return {name: result.get(name) for name in MEASURED}


def broken(recipes: Recipes, settings: list[Setting], laboratory: Laboratory) -> Job:
    """A job that fails: its text is shorter than one sequence."""
    experiment = recipes.experiment(settings[0])
    training = {**experiment.training, "sequence_length": 100_000}
    job = replace(experiment, training=training, label="broken")
    return Job(laboratory.key(job), job)


def test_pillars_change_what_they_are_for(whole: list[dict[str, Any]], tmp_path: Path) -> None:
    baseline, scan_and_peft, everything = whole
    assert [list(result["trainable_parameters"]) for result in whole] == [
        ["dense"],
        ["adapters"],
        ["dense", "gates", "recover", "adapters"],
    ]
    assert scan_and_peft["adapted_parameters"] == everything["adapted_parameters"] < baseline["adapted_parameters"] / 2
    assert set(everything["layers"]["channel_sparsity"]) == {0.25}
    assert everything["cost"]["flops_per_token"] < baseline["cost"]["flops_per_token"]
    assert all(result["int4"]["token_perplexity"] != result["test"]["token_perplexity"] for result in whole)
    correlation = scan_and_peft["layers"]["scan_correlation"]
    assert all(after > before for before, after in zip(correlation["before"], correlation["after"], strict=True))
    assert baseline["latency"] == scan_and_peft["latency"] != everything["latency"]
    write_report(tmp_path, whole, {"mode": "pilot"}, plots=False)
    assert "all (rank 2" in (tmp_path / "RESEARCH_REPORT.md").read_text()


@pytest.mark.slow
def test_workers_give_the_same_die_alone_and_stop_with_a_checkpoint(
    recipes: Recipes, settings: list[Setting], whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    """One story, since each worker's start takes seconds."""
    laboratory = Laboratory(tmp_path, recipes.measures)
    base = recipes.base(0)
    assert base is not None
    good = [recipes.experiment(setting) for setting in settings[:2]]
    killed = long(good[0], 100_000)
    stopped = long(good[0], 400)
    jobs = [Job(laboratory.key(e), e, keep=e == base) for e in (base, *good, killed, stopped)]
    jobs.insert(3, broken(recipes, settings, laboratory))
    metrics = tmp_path / laboratory.key(stopped) / "run" / "metrics.jsonl"
    with closing(run_in_workers(jobs, laboratory, count=2, threads=1)) as ends:
        done = {ended.job.key: ended for ended in itertools.islice(ends, 4)}
        for child in multiprocessing.active_children():
            child.kill()  # one does what shall be killed, the other has nothing to do yet
            child.join()
        assert next(ends) == Done(jobs[4], error="the process that did it ended with SIGKILL")
        while not metrics.is_file() or len(metrics.read_text().splitlines()) < 3:
            time.sleep(0.05)
    results = [laboratory.result(experiment) for experiment in good]
    assert [measured_of(result or {}) for result in results] == [measured_of(result) for result in whole[:2]]
    error = done[jobs[3].key].error
    assert error is not None
    assert error.startswith("DataError: training data has ")

    assert laboratory.result(stopped) is None
    (checkpoint,) = checkpoints_of(metrics.parent)
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 0 < step < 400
    (ended,) = run_here([jobs[5]], laboratory)
    assert ended.error is None
    assert f"resumed after step {step} of 400" in (metrics.parent.parent / "train.log").read_text()


def long(experiment: Experiment, steps: int) -> Experiment:
    training = {**experiment.training, "max_steps": steps, "log_interval": 1}
    return replace(experiment, training=training, label=f"{steps} steps")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Ray's own making
def test_a_ray_cluster_gives_the_same_and_sends_it_here(
    recipes: Recipes, settings: list[Setting], whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    pytest.importorskip("ray")

    def on_ray(jobs: Any, laboratory: Laboratory) -> Any:
        return run_on_ray([*jobs, broken(recipes, settings, laboratory)], laboratory, address="local", workers=2)

    lines: list[Done] = []

    class Listening(Progress):
        def finished(self, done: Done) -> None:
            lines.append(done)

    study = study_of(recipes, tmp_path, on_ray)
    results = study.perform(settings[:2], Listening())
    assert [measured_of(result) for result in results] == [measured_of(result) for result in whole[:2]]
    assert [result["training"]["data"] for result in results] == [[str(recipes.texts.task.train)]] * 2
    (failed,) = [done for done in lines if done.error is not None]
    assert failed.error is not None
    assert failed.error.startswith("DataError: training data has ")
    assert study.plan().bases == []
    assert study.laboratory.artifact(recipes.base(0) or Experiment({})).is_dir()


def test_files_are_sent_as_they_are_and_experiments_follow_them(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c.bin").write_bytes(b"\x00\xff")
    (tmp_path / "a" / "d.txt").write_bytes(b"d")
    unpack(pack(tmp_path / "a"), tmp_path / "e")
    assert pack(tmp_path / "e") == {"b/c.bin": b"\x00\xff", "d.txt": b"d"}
    unpack(pack(tmp_path / "a" / "d.txt"), tmp_path / "f" / "d.txt")
    assert (tmp_path / "f" / "d.txt").read_bytes() == b"d"
    base = Experiment({"data": "x", "seed": 1})
    experiment = Experiment({"data": ["x", "stdlib"], "checkpoint": None}, start=base)
    assert moved(experiment, {"x": "y"}) == Experiment(
        {"data": ["y", "stdlib"], "checkpoint": None}, start=Experiment({"data": "y", "seed": 1})
    )
