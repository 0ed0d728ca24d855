"""Experiments in several processes on this machine: one that crashes costs one experiment, and one signal stops all."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

from research.studies.experiments import Laboratory
from research.studies.jobs import Done, Job, Queue, laboratory_in, perform
from research.studies.measures import Measures

_STOP_LIMIT_S = 120.0  # for a step, a checkpoint, or what cannot be interrupted in an export


class _Worker:
    """A process that does one job after the other."""

    def __init__(self, laboratory: Laboratory, threads: int) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would have torch's threads, which cannot be forked
        self.connection, other = context.Pipe()
        arguments = (other, laboratory.folder, laboratory.measures, threads)
        self.process: BaseProcess = context.Process(target=_serve, args=arguments, daemon=True)
        with _ctrl_c_ignored():
            self.process.start()
        other.close()
        self.job: Job | None = None

    def begin(self, job: Job) -> None:
        self.job = job
        with contextlib.suppress(OSError):  # it died just now, as `end` will find
            self.connection.send(job)

    def end(self) -> Done:
        """The job's end, once the connection says something."""
        assert self.job is not None
        job, self.job = self.job, None
        try:
            done: Done = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return Done(job, error=f"the process that did it ended with {_exit(self.process.exitcode)}")
        return done

    @property
    def is_alive(self) -> bool:
        return self.process.is_alive()

    def ask_to_stop(self) -> None:
        """A training run writes a checkpoint, anything else is given up."""
        if self.job is not None and self.process.is_alive():
            self.process.terminate()
        self.connection.close()


def run_in_workers(
    jobs: Sequence[Job], laboratory: Laboratory, count: int, threads: int
) -> Generator[Done, None, None]:
    """Does jobs in processes of their own.

    Args:
        jobs: to do.
        laboratory: its folder is shared by the workers, which lock what they work on.
        count: of processes.
        threads: of each.

    Raises:
        KeyboardInterrupt: a signal asked to stop; the workers have stopped, and what they began goes on the next time.
    """
    queue = Queue(jobs, laboratory)
    crew: list[_Worker] = []
    try:
        while True:
            crew = [worker for worker in crew if worker.job is not None or worker.is_alive]
            while (idle := next((w for w in crew if w.job is None), None)) is not None or len(crew) < count:
                job = queue.take()
                if job is None:
                    break
                if idle is None:
                    idle = _Worker(laboratory, threads)
                    crew.append(idle)
                idle.begin(job)
            busy = {worker.connection: worker for worker in crew if worker.job is not None}
            if not busy:
                return
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                done = busy[connection].end()
                lost = queue.finish(done)
                yield done
                yield from lost
    finally:
        _stop(crew)


def _stop(crew: Sequence[_Worker]) -> None:
    for worker in crew:
        worker.ask_to_stop()
    try:
        for worker in crew:
            worker.process.join(_STOP_LIMIT_S)
    finally:  # a second signal does not wait
        for worker in crew:
            worker.process.kill()
            worker.process.join()


def _serve(connection: Connection, folder: Path, measures: Measures, threads: int) -> None:
    """What a worker does."""
    from yunmin.threads import set_threads

    os.setpgrp()  # a terminal's Ctrl-C is for the study, which then asks each worker once: twice means at once
    signal.signal(signal.SIGTERM, _interrupt)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    set_threads(threads)
    laboratory = laboratory_in(folder, measures)
    try:
        while True:
            connection.send(perform(connection.recv(), laboratory))
    except (EOFError, KeyboardInterrupt, BrokenPipeError, ConnectionResetError):
        return


@contextlib.contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """A process that is started within it ignores Ctrl-C from its first instruction on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Within it SIGTERM stops a study as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _stop_with_parent() -> None:
    """A study that was killed leaves no workers behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _exit(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"status {code}"
