"""A study from its plan to its report: what is done already is read, the rest is done, and all of it is handed on."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research.ablation.grid import Setting, distinct, planned
from research.ablation.latency import latencies
from research.ablation.recipes import Recipes
from research.ablation.trackers import Trackers
from research.studies.experiments import Experiment, Laboratory
from research.studies.jobs import Done, Job, laboratory_in
from research.studies.progress import Progress

Runner = Callable[[Sequence[Job], Laboratory], Generator[Done, None, None]]
EXPERIMENTS = "experiments"


@dataclass(frozen=True)
class Plan:
    """What a study consists of.

    Attributes:
        planned: combinations times points times seeds.
        settings: the different ones among them.
        todo: those that are not done.
        bases: seeds of base models that are to be trained first.
    """

    planned: int
    settings: list[Setting]
    todo: list[Setting]
    bases: list[int]


class Study:
    """The experiments of a study in its folder.

    Args:
        recipes: makes them.
        folder: of the study.
        runner: does them.
        trackers: told what they found.
    """

    def __init__(self, recipes: Recipes, folder: Path, runner: Runner, trackers: Trackers) -> None:
        self.recipes, self.folder = recipes, folder
        self.laboratory = laboratory_in(folder / EXPERIMENTS, recipes.measures)
        self._run, self._trackers = runner, trackers

    def plan(self) -> Plan:
        """The grid's experiments, and which of them are not done."""
        seeds = range(self.recipes.settings.seeds)
        everything = list(planned(self.recipes.settings.grid, seeds))
        settings = distinct(everything)
        todo = [s for s in settings if self.laboratory.result(self.recipes.experiment(s)) is None]
        return Plan(len(everything), settings, todo, self._bases_to_do(todo))

    def perform(self, settings: Sequence[Setting], progress: Progress) -> list[dict[str, Any]]:
        """Does what is not done of some settings.

        Returns:
            Results in the same order, each with its `combination`, `point` and `seed`; those that failed have an
            `error` and nothing measured.

        Raises:
            KeyboardInterrupt: a signal asked to stop; what was begun goes on the next time.
        """
        experiments = {setting: self.recipes.experiment(setting) for setting in settings}
        keys = {setting: self.laboratory.key(experiment) for setting, experiment in experiments.items()}
        setting_of = {key: setting for setting, key in keys.items()}
        jobs = {
            keys[setting]: Job(keys[setting], experiment)
            for setting, experiment in experiments.items()
            if self.laboratory.result(experiment) is None
        }
        errors: dict[str, str] = {}
        bases = self._bases_to_do([setting_of[key] for key in jobs])
        progress.more(len(bases) + len(jobs))
        with closing(self._run([*self._base_jobs(bases), *jobs.values()], self.laboratory)) as ends:
            for done in ends:
                progress.finished(done)
                if done.error is not None:
                    errors[done.job.key] = done.error
                elif done.result is not None and (setting := setting_of.get(done.job.key)) is not None:
                    self._trackers.tell(_named(done.result, setting))
        results = []
        for setting, experiment in experiments.items():
            found = self.laboratory.result(experiment)
            if found is None:
                error = errors.get(keys[setting], "it was never done")
                found = {"key": keys[setting], "label": experiment.label, "error": error}
            results.append(_named(found, setting))
            self._trackers.tell(results[-1])
        return results

    def with_latencies(self, results: Sequence[dict[str, Any]], report: Callable[[str], None]) -> list[dict[str, Any]]:
        """The results with the speed of their models."""
        finished = [result for result in results if "error" not in result]
        times = latencies(finished, self.recipes.model, self.laboratory, report) if finished else {}
        return [{**result, "latency": times.get(result["key"])} for result in results]

    def bases(self) -> list[dict[str, Any]]:
        """What is known of the base models: their test perplexity before they saw any of the task, by seed."""
        found = []
        for seed in range(self.recipes.settings.seeds):
            base = self.recipes.base(seed)
            result = None if base is None else self.laboratory.result(base)
            if result is not None:
                found.append({"seed": seed, "key": result["key"], "test": result["test"], "cost": result["cost"]})
        return found

    def _bases_to_do(self, settings: Sequence[Setting]) -> list[int]:
        seeds = dict.fromkeys(setting.seed for setting in settings)
        return [s for s in seeds if (b := self.recipes.base(s)) is not None and not self._has_artifact(b)]

    def _base_jobs(self, seeds: Sequence[int]) -> list[Job]:
        bases = [base for seed in seeds if (base := self.recipes.base(seed)) is not None]
        return [Job(self.laboratory.key(base), base, keep=True) for base in bases]

    def _has_artifact(self, base: Experiment) -> bool:
        return self.laboratory.result(base) is not None and self.laboratory.artifact(base).is_dir()


def _named(result: dict[str, Any], setting: Setting) -> dict[str, Any]:
    return {**result, "combination": setting.combination, "point": setting.point, "seed": setting.seed}
