"""Runs a comparison's experiments in several processes, as many rounds as its choices need, and collects."""

from __future__ import annotations

import importlib
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from research.pillars.study import Study
from research.reports import words
from research.studies.experiments import Experiment, Laboratory
from research.studies.jobs import Job
from research.studies.progress import Progress
from research.studies.workers import run_in_workers
from yunmin.errors import DivergenceError, TrainingError


def run_comparison(module_name: str, study: Study, workers: int, progress: Progress) -> dict[str, Any]:
    """Everything a comparison needs that was not done before.

    Args:
        module_name: of `research.pillars`; has `experiments`, `collect`, `KEEPS` and `ADAPTS`.
        study: its settings.
        workers: processes, each of one thread.
        progress: shows how far it is.

    Returns:
        What `collect` found, with the study's `settings`.

    Raises:
        DataError: texts share documents.
        TrainingError: an experiment failed; names it.
        KeyboardInterrupt: a signal asked to stop; the next call goes on.
    """
    module = importlib.import_module(f"research.pillars.{module_name}")
    study.check_texts()
    bases = study.laboratory(study.base_text)
    crew = _Crew(workers, progress)
    crew.run([study.base(seed) for seed in study.seeds], bases, keep=True)
    laboratory = study.laboratory(study.text)
    while True:
        wanted: list[Experiment] = module.experiments(study, laboratory)
        if not crew.run(wanted, laboratory, keep=module.KEEPS):
            break
    found = module.collect(study, laboratory)
    results = (laboratory.result(experiment) for experiment in wanted)
    scored = next(result["test"]["tokens"] for result in results if result is not None)  # may be fewer than asked for
    settings = {**study.describe(), "test_tokens": scored, "adapts": module.ADAPTS}
    return {"comparison": module_name, "settings": settings, **found}


@dataclass(frozen=True)
class _Crew:
    workers: int
    progress: Progress

    def run(self, experiments: list[Experiment], laboratory: Laboratory, *, keep: bool) -> bool:
        """Runs those without a result, or without an artifact that is to be kept; returns whether there were any.

        One that may diverge and does is given up: a search for a learning rate then takes another one.
        """
        by_key = {
            laboratory.key(e): e
            for e in experiments
            if laboratory.failure(e) is None
            and (laboratory.result(e) is None or (keep and not laboratory.artifact(e).is_dir()))
        }
        if not by_key:
            return False
        jobs = [Job(key, experiment, keep) for key, experiment in by_key.items()]
        count = min(self.workers, len(jobs))
        self.progress.more(len(jobs))
        self.progress.line(
            f"{words.count(len(jobs), 'experiment')} to run in {words.count(count, 'process', 'processes')}, from "
            f"{jobs[0].experiment.label} on; logs in {laboratory.folder}"
        )
        with closing(run_in_workers(jobs, laboratory, count, 1)) as ends:
            for done in ends:
                self.progress.finished(done)
                if done.error is None:
                    continue
                if not (done.job.experiment.may_diverge and done.error.startswith(DivergenceError.__name__)):
                    label, key = done.job.experiment.label, done.job.key
                    raise TrainingError(f"{label}: {done.error}; {laboratory.folder / key} has the log")
                laboratory.give_up(done.job.experiment, done.error)
        return True
