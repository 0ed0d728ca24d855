"""Experiments to be done and how each ended, whoever does them: this process, workers beside it, or a cluster."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from research.studies.experiments import Experiment, Laboratory
from research.studies.measures import Measures

LOG_FILE = "log.txt"


@dataclass(frozen=True)
class Job:
    """An experiment to be done.

    Attributes:
        key: of the experiment.
        experiment: what to do.
        keep: whether its artifact is kept, which others start from or measure further.
    """

    key: str
    experiment: Experiment
    keep: bool = False


@dataclass(frozen=True)
class Done:
    """How a job ended.

    Attributes:
        job: that one.
        result: as the file of its result has it; None where it failed.
        error: one line that says why it failed.
    """

    job: Job
    result: dict[str, Any] | None = None
    error: str | None = None


class Queue:
    """Jobs in order, each ready once the one that it starts from is done.

    Args:
        jobs: those that others start from are among them, unless they are done.
        laboratory: tells keys.
    """

    def __init__(self, jobs: Sequence[Job], laboratory: Laboratory) -> None:
        self._waiting = list(jobs)
        starts = [job.experiment.start for job in jobs]
        keys = {id(start): laboratory.key(start) for start in starts if start is not None}
        self._needs = {
            job.key: None if job.experiment.start is None else keys[id(job.experiment.start)] for job in jobs
        }
        self._open = {job.key for job in jobs}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def needs(self, job: Job) -> str | None:
        """The key of the experiment it starts from."""
        return self._needs[job.key]

    def take(self) -> Job | None:
        """The first job that is ready, which leaves the queue; None if none is."""
        for number, job in enumerate(self._waiting):
            if self._needs[job.key] not in self._open:
                return self._waiting.pop(number)
        return None

    def finish(self, done: Done) -> list[Done]:
        """Counts a job as done; returns those that cannot be done any more because it failed."""
        self._open.discard(done.job.key)
        if done.error is None:
            return []
        lost = [job for job in self._waiting if self._needs[job.key] == done.job.key]
        self._waiting = [job for job in self._waiting if job not in lost]
        failed = [Done(job, error=f"what it starts from failed: {done.error}") for job in lost]
        return failed + [further for one in failed for further in self.finish(one)]


def run_here(jobs: Sequence[Job], laboratory: Laboratory) -> Generator[Done, None, None]:
    """Does jobs in this process, one after the other.

    Raises:
        KeyboardInterrupt: a signal asked to stop; what was begun goes on the next time.
    """
    queue = Queue(jobs, laboratory)
    while (job := queue.take()) is not None:
        done = perform(job, laboratory)
        lost = queue.finish(done)
        yield done
        yield from lost


def perform(job: Job, laboratory: Laboratory) -> Done:
    """Does one job; what it prints goes to a log in its folder. An error of any kind ends this job alone.

    Raises:
        KeyboardInterrupt: a signal asked to stop.
    """
    folder = laboratory.folder / job.key
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG_FILE).open("a", encoding="utf-8") as log, contextlib.redirect_stderr(log):
        try:
            done = Done(job, laboratory.run(job.experiment, keep=job.keep))
        except Exception as error:  # noqa: BLE001 (one experiment that fails must not end a study of days)
            done = Done(job, error=one_line(error))
    _freeze_modules()
    return done


@cache
def _freeze_modules() -> None:
    """Spares garbage collection, of which an export does several, what the first experiment imported: a second each."""
    gc.collect()
    gc.freeze()


def one_line(error: BaseException) -> str:
    """What went wrong, for a table."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def laboratory_in(folder: Path, measures: Measures) -> Laboratory:
    """A laboratory that says in the log what it does."""
    return Laboratory(folder, measures, lambda text: print(text, file=sys.stderr, flush=True))
