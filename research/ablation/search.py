"""A search instead of the whole grid: Optuna draws combinations and settings by what earlier ones gave."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from research.ablation.grid import Grid, Setting, setting
from research.ablation.outcome import COMBINATIONS, GRID_KEYS
from research.ablation.study import Study
from research.studies.progress import Progress
from yunmin.errors import MissingExtraError

STORAGE_FILE = "optuna.db"
OBJECTIVES = ("log perplexity on the tuning text", "FLOPs per token", "parameters trained last")
_STUDY = "ablation"
_AT_ONCE = 4  # trials drawn before the first of them is told, however many workers there are: so that draws repeat
_DIGITS = 2  # of what is drawn: closer values differ by less than chance does


def search(study: Study, progress: Progress) -> list[dict[str, Any]]:
    """Runs trials until there are as many as the settings want; those of an earlier call count.

    Three objectives are minimized together, by the tree-structured Parzen estimator (Ozaki et al. 2022). Perplexity is
    that on the text to tune by: the test text, which is reported on, has no part in any choice. Each trial runs with
    all seeds, and its objectives are means over them. The grid's smallest and largest values bound what is drawn. The
    eight combinations in the middle of the space come first, so that they can be compared.

    Returns:
        Results of all trials' experiments, as `Study.perform` gives them, each once.

    Raises:
        MissingExtraError: optuna is not installed.
        KeyboardInterrupt: a signal asked to stop; trials that were begun go on the next time.
    """
    try:
        import optuna
    except ModuleNotFoundError:
        raise MissingExtraError("optuna", "research", "--search optuna") from None

    wanted, grid, seeds = study.recipes.settings.trials, study.recipes.settings.grid, study.recipes.settings.seeds
    assert wanted is not None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.RDBStorage(f"sqlite:///{study.folder / STORAGE_FILE}")
    found: dict[Setting, dict[str, Any]] = {}

    def do(settings_of: Mapping[int, list[Setting]]) -> None:
        """Does the experiments of some trials, by number."""
        settings = list(dict.fromkeys(s for own in settings_of.values() for s in own))
        found.update(zip(settings, study.perform(settings, progress), strict=True))

    def tell(settings_of: Mapping[int, list[Setting]]) -> None:
        for number, own in settings_of.items():
            values = objectives([found[s] for s in own])
            trials.tell(number, values, optuna.trial.TrialState.FAIL if values is None else None)

    try:
        trials = optuna.create_study(
            study_name=_STUDY, storage=storage, directions=["minimize"] * len(OBJECTIVES), load_if_exists=True
        )
        if not trials.trials:
            for combination in COMBINATIONS:
                trials.enqueue_trial({"combination": combination, **_middle(grid)})
        begun = {t.number: _settings(t.params, seeds) for t in trials.get_trials() if _is_drawn(t.params)}
        do(begun)
        tell(
            {t.number: begun[t.number] for t in trials.get_trials() if t.number in begun and not t.state.is_finished()}
        )
        while (left := wanted - sum(t.state.is_finished() for t in trials.get_trials())) > 0:
            # a sampler of its own for each draw, so that a search that was stopped draws on as one that was not
            trials.sampler = optuna.samplers.TPESampler(seed=len(begun))
            drawn = [trials.ask() for _ in range(min(_AT_ONCE, left))]
            for trial in drawn:
                _draw(trial, grid)
            now = {trial.number: _settings(trial.params, seeds) for trial in drawn}
            do(now)
            tell(now)
            begun |= now
    finally:
        storage.engine.dispose()
    return list(found.values())


def objectives(results: Sequence[Mapping[str, Any]]) -> tuple[float, ...] | None:
    """The means of `OBJECTIVES` over a trial's seeds; None where one failed or learned nothing."""
    if any("error" in result for result in results):
        return None
    by_seed = [
        (
            math.log(list(result["validation_perplexity"].values())[-1]),
            float(result["cost"]["flops_per_token"]),
            float(result["adapted_parameters"]),
        )
        for result in results
    ]
    means = tuple(statistics.fmean(values) for values in zip(*by_seed, strict=True))
    return means if all(math.isfinite(value) for value in means) else None


def _draw(trial: Any, grid: Grid) -> None:
    """Draws all settings, also those that nothing depends on: a space that is always the same is easier to learn."""
    trial.suggest_categorical("combination", COMBINATIONS)
    trial.suggest_int("rank", min(grid.rank), max(grid.rank), log=True)
    for key in GRID_KEYS:
        if key != "rank":
            trial.suggest_float(key, min(getattr(grid, key)), max(getattr(grid, key)))


def _middle(grid: Grid) -> dict[str, float]:
    """The middle value of each key that was given."""
    return {key: sorted(getattr(grid, key))[len(getattr(grid, key)) // 2] for key in GRID_KEYS}


def _is_drawn(params: Mapping[str, Any]) -> bool:
    return {"combination", *GRID_KEYS} <= params.keys()


def _settings(params: Mapping[str, Any], seeds: int) -> list[Setting]:
    point = {key: params[key] if key == "rank" else round(params[key], _DIGITS) for key in GRID_KEYS}
    return [setting(params["combination"], point, seed) for seed in range(seeds)]
