"""What `yunmin ablate` does with its options: the study's settings, its plan on the screen, its run, its report."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from research.ablation.estimate import estimate
from research.ablation.grid import grid_from
from research.ablation.recipes import Recipes
from research.ablation.settings import DEFAULT_POINT, SETTINGS_FILE, Settings, default_settings, with_keys
from research.ablation.sources import prepare_texts
from research.ablation.study import Plan, Runner, Study
from research.ablation.trackers import Trackers
from research.reports.words import duration
from research.studies.jobs import run_here
from research.studies.progress import Progress
from research.studies.workers import run_in_workers, terminated_as_interrupted
from yunmin.cli import print_json
from yunmin.errors import ConfigError

_TRIALS = 40
_TEXTS = "texts"


def dry_run(options: argparse.Namespace) -> int:
    """Prints the plan of a study, which leaves nothing behind."""
    settings, folder = settings_from(options), options.resume or options.output
    workers = _workers(options, settings)
    with tempfile.TemporaryDirectory() as aside:
        texts = Path(aside) / _TEXTS if folder is None or not folder.is_dir() else folder / _TEXTS
        recipes = Recipes(settings, prepare_texts(settings, texts))
        where = Path(aside) if folder is None else folder
        plan = Study(recipes, where, run_here, _trackers(options, settings, where)).plan()
        if options.json:
            print_json(_described(plan, recipes, workers))
        else:
            _show_plan(plan, recipes, workers, sys.stdout.write)
    return 0


def perform(options: argparse.Namespace) -> int:
    """Does a study, or goes on with it; returns 1 where an experiment failed, 130 where it was stopped."""
    settings = settings_from(options)
    folder: Path = options.resume or options.output or Path(time.strftime("research_outputs_%Y%m%d-%H%M%S"))
    _check_folder(folder)
    if not options.disable_visualization:
        _require_plots()
    trackers = _trackers(options, settings, folder)
    workers = _workers(options, settings)
    runner = _runner(options, workers)
    folder = folder.resolve()
    recipes = Recipes(settings, prepare_texts(settings, folder / _TEXTS))
    settings.write(folder)
    study = Study(recipes, folder, runner, trackers)
    plan = study.plan()
    _show_plan(plan, recipes, workers, sys.stderr.write)
    begun = time.monotonic()
    try:
        with terminated_as_interrupted():
            results = _results(study, plan)
    except KeyboardInterrupt:
        left = len(study.plan().todo) if settings.trials is None else "some"
        command = f"yunmin ablate --resume {shlex.quote(str(folder))}"
        print(f"stopped with {left} experiments left; go on with\n  {command}", file=sys.stderr)
        return 130
    return _finish(study, plan, results, options, time.monotonic() - begun)


def settings_from(options: argparse.Namespace) -> Settings:
    """The settings of the mode, or of the study that is taken up again, with what the options change.

    Raises:
        ConfigError: an impossible value, or options that do not go together.
    """
    if options.resume is not None and options.output is not None:
        raise ConfigError("--resume names the folder already: expected no --output")
    settings = default_settings(options.mode or "pilot") if options.resume is None else Settings.read(options.resume)
    if options.mode not in (None, settings.mode):
        raise ConfigError(f"--mode {options.mode}: {options.resume} is a study in mode {settings.mode}")
    for name in ("epochs", "seeds", "trials", "workers"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name}: expected at least 1, got {value}")
    if options.trials is not None and options.search is None and settings.trials is None:
        raise ConfigError("--trials are of a search: expected --search optuna with it")
    grid = DEFAULT_POINT if options.disable_grid_search else settings.grid
    given = {
        "grid": grid_from(_grid_values(options.grid), grid, "--grid"),
        "epochs": options.epochs,
        "seeds": options.seeds,
        "data": None if options.data is None else tuple(_absolute(source) for source in options.data),
        "checkpoint": None if options.checkpoint is None else _absolute(options.checkpoint),
        "training": with_keys(settings.training, options.set),
        "project": options.project,
        "trials": options.trials or settings.trials or (_TRIALS if options.search else None),
    }
    return replace(settings, **{name: value for name, value in given.items() if value is not None})


def _grid_values(texts: list[str]) -> dict[str, list[float]]:
    values = {}
    for text in texts:
        key, _, numbers = text.partition("=")
        try:
            values[key] = [float(number) for number in numbers.split(",")]
        except ValueError:
            raise ConfigError(f"--grid {text}: expected KEY=NUMBER,NUMBER") from None
    return values


def _absolute(source: str) -> str:
    return str(Path(source).resolve()) if Path(source).exists() else source


def _check_folder(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not (folder / SETTINGS_FILE).is_file():
        raise ConfigError(f"{folder}: expected a new folder or that of a study, found no {SETTINGS_FILE} in it")


def _require_plots() -> None:
    import importlib.util

    from yunmin.errors import MissingExtraError

    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "research", "the report's plots (not with --disable-visualization)")


def _trackers(options: argparse.Namespace, settings: Settings, folder: Path) -> Trackers:
    return Trackers(folder, settings.project, tensorboard=options.tensorboard, wandb=options.wandb)


def _workers(options: argparse.Namespace, settings: Settings) -> int:
    """One process per core, each with one thread: small models gain nothing from a second one."""
    if options.workers is not None:
        return int(options.workers)
    import torch

    if settings.config().device != "cpu" and torch.cuda.is_available():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _runner(options: argparse.Namespace, workers: int) -> Runner:
    if options.ray is not None:
        from research.studies.ray_runner import run_on_ray

        return partial(run_on_ray, address=options.ray, workers=workers)
    return run_here if workers == 1 else partial(run_in_workers, count=workers, threads=1)


def _results(study: Study, plan: Plan) -> list[dict[str, Any]]:
    with Progress() as progress:
        if study.recipes.settings.trials is None:
            results = study.perform(plan.settings, progress)
        else:
            from research.ablation.search import search

            results = search(study, progress)
        return study.with_latencies(results, progress.line)


def _finish(
    study: Study, plan: Plan, results: list[dict[str, Any]], options: argparse.Namespace, seconds: float
) -> int:
    from research.ablation.report import write_report

    settings, failed = study.recipes.settings, sum("error" in result for result in results)
    facts = {
        **asdict(settings),
        "steps": study.recipes.steps,
        "planned": plan.planned,
        "distinct": len(results),
        "failed": failed,
        "base_models": study.bases(),
        "texts": {name: path.name for name, path in _text_files(study.recipes).items()},
        "source": study.recipes.texts.task.source,
        "seconds": seconds,
        "command": f"yunmin ablate --resume {study.folder.name}",
    }
    write_report(study.folder, results, facts, plots=not options.disable_visualization)
    print(f"{len(results) - failed} experiments, {failed} failed", file=sys.stderr)
    if options.json:
        outcome = {"output": str(study.folder), "planned": plan.planned, "distinct": len(results), "failed": failed}
        print_json({**outcome, "seconds": seconds})
    else:
        print(study.folder / "RESEARCH_REPORT.md")
    return 1 if failed else 0


def _text_files(recipes: Recipes) -> dict[str, Path]:
    texts = recipes.texts
    own = {"train": texts.task.train, "tune": texts.task.tune, "test": texts.task.test}
    return own if recipes.settings.checkpoint is not None else {"base": texts.base, **own}


def _described(plan: Plan, recipes: Recipes, workers: int) -> dict[str, Any]:
    settings = recipes.settings
    guess = estimate(recipes, plan.todo, len(plan.bases), workers)
    return {
        "mode": settings.mode,
        "grid_points": len(settings.grid.points()),
        "planned_per_seed": plan.planned // settings.seeds,
        "seeds": settings.seeds,
        "planned": plan.planned,
        "distinct": len(plan.settings),
        "todo": len(plan.todo),
        "base_models": 0 if settings.checkpoint else settings.seeds,
        "steps": recipes.steps,
        "workers": workers,
        "step_seconds": guess.step_seconds,
        "estimated_seconds": guess.seconds,
    }


def _show_plan(plan: Plan, recipes: Recipes, workers: int, write: Any) -> None:
    settings, facts, model = recipes.settings, _described(plan, recipes, workers), recipes.model
    grid = " x ".join(
        f"{key} {{{', '.join(f'{v:g}' for v in values)}}}" for key, values in asdict(settings.grid).items()
    )
    start = (
        f"from {settings.checkpoint}" if settings.checkpoint else f"{len(plan.bases)} base models to be trained first"
    )
    step_ms = 1e3 * facts["step_seconds"]
    rows = {
        settings.mode: f"8 combinations of the pillars x {facts['grid_points']} points = "
        f"{facts['planned_per_seed']:,} experiments per seed, {settings.seeds} seeds",
        "grid": f"{grid} = {facts['grid_points']} points",
        "planned": f"{facts['planned']:,}, of which {facts['distinct']:,} differ; {facts['todo']:,} are to be done",
        "model": f"d_model {model.d_model}, {model.n_layers} layers, {start}",
        "text": f"{recipes.texts.task.source}, divided in three; {facts['steps']:,} steps per experiment",
        "time": f"about {duration(facts['estimated_seconds'])} with {workers} workers, from {step_ms:.0f} ms per "
        "step as timed just now on one thread",
    }
    if settings.trials is not None:
        rows["planned"] = f"{settings.trials} trials with Optuna instead of the grid, each with {settings.seeds} seeds"
    write("\n".join(f"{name:<15} {text}" for name, text in rows.items()) + "\n")
