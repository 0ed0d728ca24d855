"""A study's machinery: nothing twice, failures that cost one experiment, stops that cost nothing, trackers, search."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest

from research.ablation.grid import Grid
from research.ablation.latency import latencies, shape_of
from research.ablation.recipes import Recipes
from research.ablation.search import objectives, search
from research.ablation.study import Study
from research.ablation.trackers import Trackers
from research.studies.experiments import Experiment, Interrupted, Laboratory
from research.studies.jobs import Done, Job, Queue, run_here
from research.studies.progress import Progress
from tests.models import small_config
from tests.research.ablation.fakes import FAILING, made_up_runs, tiny_recipes
from tests.research.ablation.studies import made_up
from yunmin.errors import MissingExtraError

__all__ = ["made_up_runs"]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Recipes:
    return tiny_recipes(tmp_path_factory.mktemp("study"))


def study_in(folder: Path, recipes: Recipes, **trackers: bool) -> Study:
    told = Trackers(folder, "project", **{"tensorboard": False, "wandb": False, **trackers})
    return Study(recipes, folder, run_here, told)


def silent() -> Progress:
    return Progress(io.StringIO())


def test_every_experiment_is_done_once_bases_first(recipes: Recipes, tmp_path: Path, made_up_runs: list[str]) -> None:
    study = study_in(tmp_path, recipes)
    plan = study.plan()
    assert (plan.planned, len(plan.settings), plan.todo, plan.bases) == (32, 24, plan.settings, [0, 1])
    results = study.perform(plan.settings, silent())
    assert len(made_up_runs) == len(set(made_up_runs)) == 26
    assert made_up_runs[:2] == ["base model, seed 0", "base model, seed 1"]
    assert [(r["combination"], r["point"], r["seed"]) for r in results] == [
        (s.combination, s.point, s.seed) for s in plan.settings
    ]
    assert not study.plan().todo
    assert not study.plan().bases
    assert study.perform(plan.settings, silent()) == results
    assert len(made_up_runs) == 26
    assert [base["seed"] for base in study.bases()] == [0, 1]


def test_an_experiment_that_fails_is_recorded_with_one_line_and_tried_again_the_next_time(
    recipes: Recipes, tmp_path: Path, made_up_runs: list[str]
) -> None:
    study = study_in(tmp_path, recipes, tensorboard=True)
    FAILING.append("masking (tau 0.5, sparsity 0.3), seed 1")
    results = study.perform(study.plan().settings, silent())
    errors = {r["label"]: r["error"] for r in results if "error" in r}
    assert set(errors.values()) == {"TrainingError: the loss is nan"}
    assert set(errors) == {"masking (tau 0.5, sparsity 0.3), seed 1", "scan+masking (tau 0.5, sparsity 0.3), seed 1"}
    FAILING.clear()
    again = study.perform(study.plan().settings, silent())
    assert not any("error" in result for result in again)
    assert len(made_up_runs) == 26 + 2


def test_what_starts_from_a_base_that_failed_fails_with_its_reason(
    recipes: Recipes, tmp_path: Path, made_up_runs: list[str]
) -> None:
    FAILING.append("base model, seed 1")
    study = study_in(tmp_path, recipes)
    results = study.perform(study.plan().settings, silent())
    by_seed = {seed: {result.get("error") for result in results if result["seed"] == seed} for seed in (0, 1)}
    assert by_seed == {0: {None}, 1: {"what it starts from failed: TrainingError: the loss is nan"}}
    assert len(made_up_runs) == 2 + 12


def test_a_stop_keeps_what_is_done(
    recipes: Recipes, tmp_path: Path, made_up_runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study, run = study_in(tmp_path, recipes), Laboratory.run

    def stops(laboratory: Laboratory, experiment: Experiment, *, keep: bool = False) -> dict[str, Any]:
        if len(made_up_runs) == 7:
            raise Interrupted("stopped after step 2 of 4")
        return run(laboratory, experiment, keep=keep)

    monkeypatch.setattr(Laboratory, "run", stops)
    with pytest.raises(KeyboardInterrupt):
        study.perform(study.plan().settings, silent())
    monkeypatch.setattr(Laboratory, "run", run)
    assert len(study.plan().todo) == 24 - 5
    study.perform(study.plan().settings, silent())
    assert len(made_up_runs) == len(set(made_up_runs)) == 26


def test_more_seeds_add_to_a_study(recipes: Recipes, tmp_path: Path, made_up_runs: list[str]) -> None:
    study = study_in(tmp_path, recipes)
    study.perform([s for s in study.plan().settings if s.seed == 0], silent())
    assert len(made_up_runs) == 13
    assert (len(study.plan().todo), study.plan().bases) == (12, [1])


def test_a_queue_hands_out_what_is_ready(recipes: Recipes, tmp_path: Path) -> None:
    laboratory = Laboratory(tmp_path, recipes.measures)
    base = recipes.base(0)
    assert base is not None
    own = Job("own", Experiment({}, start=base))
    jobs = [own, Job(laboratory.key(base), base, keep=True), Job("other", Experiment({}, label="other"))]
    queue = Queue(jobs, laboratory)
    assert [queue.take(), queue.take(), queue.take()] == [jobs[1], jobs[2], None]
    assert queue.finish(Done(jobs[1], result={})) == []
    assert (queue.take(), bool(queue)) == (own, False)


def test_trackers_are_told_once(recipes: Recipes, tmp_path: Path, made_up_runs: list[str]) -> None:
    for _ in range(2):
        study = study_in(tmp_path, recipes, tensorboard=True)
        results = study.perform([s for s in study.plan().settings if s.seed == 0], silent())
    assert len(made_up_runs) == 13
    runs = sorted(path.name for path in (tmp_path / "tensorboard").iterdir())
    assert len(runs) == len(results) == 12
    assert "all-rank-2-tau-0.5-sparsity-0.3-share-0.4-seed-0" in "\n".join(runs)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard" / runs[0]))
    events.Reload()
    assert {"test/perplexity", "cost/flops_per_token", "training/adapted_parameters"} <= set(events.Tags()["scalars"])


def test_weights_and_biases_get_settings_and_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    calls: list[dict[str, Any]] = []

    class Run:
        def log(self, values: dict[str, float]) -> None:
            calls.append(values)

        def finish(self) -> None:
            calls.append({})

    def init(**options: Any) -> Run:
        calls.append(options)
        return Run()

    monkeypatch.setattr(wandb, "init", init)
    result = made_up(seeds=1)[-1]
    trackers = Trackers(tmp_path, "mine", tensorboard=False, wandb=True)
    trackers.tell(result)
    trackers.tell({**result, "key": "failed", "error": "x"})
    Trackers(tmp_path, "mine", tensorboard=False, wandb=True).tell(result)
    options, values, _ = calls
    assert (options["project"], options["group"]) == ("mine", tmp_path.name)
    assert options["config"]["combination"] == "all"
    assert values["test/perplexity"] == result["test"]["token_perplexity"]


def test_each_shape_is_timed_once_and_never_again(tmp_path: Path) -> None:
    config = small_config()
    whole, cut = ([0.0] * config.n_layers, [0.5] * config.n_layers)
    results = [
        {"key": str(n), "layers": {"channel_sparsity": sparsity, "state_sparsity": whole}}
        for n, sparsity in enumerate((whole, cut, whole))
    ]
    assert shape_of(results[1], config).d_inner == tuple(d // 2 for d in config.d_inner)
    laboratory = Laboratory(tmp_path, tiny_recipes(tmp_path).measures)
    lines: list[str] = []
    found = latencies(results, config, laboratory, lines.append)
    assert lines == ["timing 2 shapes of model, 1 threads"]
    assert found["0"] == found["2"] != found["1"]
    assert all(time[name] > 0 for time in found.values() for name in ("prefill_ms", "decode_ms"))
    assert latencies(results, config, laboratory, lines.append) == found
    assert len(lines) == 1


def test_progress_says_how_each_ended_and_how_long_it_takes(recipes: Recipes) -> None:
    stream = io.StringIO()
    job = Job("k", Experiment({}, label="all, seed 0"))
    with Progress(stream) as progress:
        progress.more(2)
        progress.finished(Done(job, result={"seconds": {"train": 61.0}, "test": {"token_perplexity": 31.24}}))
        progress.finished(Done(job, error="TrainingError: the loss is nan"))
    first, second = stream.getvalue().splitlines()
    assert first.startswith("[1/2] all, seed 0: test perplexity 31.240, 61 s; about ")
    assert second == "[2/2] all, seed 0: failed: TrainingError: the loss is nan"


@pytest.mark.slow
def test_search_begins_with_all_combinations_and_draws_on_after_a_stop_as_if_there_had_been_none(
    tmp_path: Path, made_up_runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    wide = Grid((2, 8), (0.3, 0.8), (0.3, 0.7), (0.2, 0.6))
    recipes = tiny_recipes(tmp_path, grid=wide, trials=11)
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole = search(study_in(tmp_path / "whole", recipes), silent())
    assert len({r["combination"] for r in whole}) == 8
    assert len(whole) % 2 == 0
    assert all(0.3 <= r["point"].get("sparsity", 0.5) <= 0.7 for r in whole)
    done = len(made_up_runs)
    assert search(study_in(tmp_path / "whole", recipes), silent()) == whole
    assert len(made_up_runs) == done

    made_up_runs.clear()
    run = Laboratory.run

    def stops(laboratory: Laboratory, experiment: Experiment, *, keep: bool = False) -> dict[str, Any]:
        if len(made_up_runs) == 17:
            raise Interrupted("stopped")
        return run(laboratory, experiment, keep=keep)

    monkeypatch.setattr(Laboratory, "run", stops)
    with pytest.raises(KeyboardInterrupt):
        search(study_in(tmp_path / "stopped", recipes), silent())
    monkeypatch.setattr(Laboratory, "run", run)
    assert search(study_in(tmp_path / "stopped", recipes), silent()) == whole


def test_objectives_are_means_over_seeds_on_the_text_to_tune_by() -> None:
    grid = {"rank": (4,), "tau": (0.5,), "sparsity": (0.5,), "share": (0.4,)}
    own = [result for result in made_up(seeds=2, grid=grid) if result["combination"] == "all"]
    found = objectives(own)
    assert found is not None
    tuned = [list(r["validation_perplexity"].values())[-1] for r in own]
    assert found[0] == pytest.approx((math.log(tuned[0]) + math.log(tuned[1])) / 2)
    assert objectives([own[0], {"error": "x"}]) is None


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_missing_trackers_are_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=package):
        Trackers(tmp_path, "x", **{"tensorboard": False, "wandb": False, package: True})
