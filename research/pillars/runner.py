"""Runs a comparison's experiments in several processes, as many rounds as its choices need, and collects."""

from __future__ import annotations

import importlib
from typing import Any

from research.pillars.study import Study
from research.studies.experiments import Experiment, Laboratory
from research.studies.jobs import Job
from research.studies.workers import run_in_workers
from yunmin.errors import TrainingError


def run_comparison(module_name: str, study: Study, workers: int) -> dict[str, Any]:
    """Everything a comparison needs that was not done before.

    Args:
        module_name: of `research.pillars`; has `experiments`, `collect`, `KEEPS` and `ADAPTS`.
        study: its settings.
        workers: processes, each of one thread.

    Returns:
        What `collect` found, with the study's `settings`.

    Raises:
        TrainingError: an experiment failed; names it.
        KeyboardInterrupt: a signal asked to stop; the next call goes on.
    """
    module = importlib.import_module(f"research.pillars.{module_name}")
    bases = study.laboratory(study.base_text)
    _run([study.base(seed) for seed in study.seeds], bases, workers, study, keep=True)
    laboratory = study.laboratory(study.text)
    while True:
        wanted: list[Experiment] = module.experiments(study, laboratory)
        if not _run(wanted, laboratory, workers, study, keep=module.KEEPS):
            break
    found = module.collect(study, laboratory)
    scored = laboratory.run(wanted[0])["test"]["tokens"]  # there may be fewer than were asked for
    settings = {**study.describe(), "test_tokens": scored, "adapts": module.ADAPTS}
    return {"comparison": module_name, "settings": settings, **found}


def _run(experiments: list[Experiment], laboratory: Laboratory, workers: int, study: Study, *, keep: bool) -> bool:
    """Runs those that have no result, or no artifact where it is to be kept; returns whether there were any."""
    by_key = {
        laboratory.key(e): e
        for e in experiments
        if laboratory.result(e) is None or (keep and not laboratory.artifact(e).is_dir())
    }
    jobs = [Job(key, experiment, keep) for key, experiment in by_key.items()]
    for number, done in enumerate(run_in_workers(jobs, laboratory, min(workers, len(jobs)), 1) if jobs else (), 1):
        label = done.job.experiment.label
        if done.error is not None:
            raise TrainingError(f"{label}: {done.error}; {laboratory.folder / done.job.key} has the log")
        assert done.result is not None
        perplexity = done.result["test"]["token_perplexity"]
        study.report(f"{number} of {len(jobs)}: {label}: test perplexity {perplexity:.3f}")
    return bool(jobs)
