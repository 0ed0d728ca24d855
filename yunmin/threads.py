"""One number of threads for everything that computes on the CPU, and the team that runs native kernels.

A kernel is a compiled function that releases the interpreter's lock and takes `rank` and `size` as its last
arguments; a team calls it once per thread, and each call does its share. Work is divided by position, never by who is
first, so a result depends on the number of threads at most, not on their luck.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import torch

import yunmin
from yunmin.errors import ConfigError

if yunmin._chose_to_wait:
    os.environ.pop("OMP_WAIT_POLICY", None)

_VARIABLE = "YUNMIN_THREADS"
_chosen: int | None = None


def set_threads(count: int) -> None:
    """Sets how many threads torch and the native kernels use, from here on.

    Raises:
        ConfigError: `count` is not positive.
    """
    global _chosen
    if isinstance(count, bool) or count < 1:
        raise ConfigError(f"threads must be >= 1, got {count}")
    _chosen = count
    torch.set_num_threads(count)


def get_threads() -> int:
    """The number set, else that of `YUNMIN_THREADS`, else (or where that is 0) torch's own.

    Raises:
        ConfigError: `YUNMIN_THREADS` is no number.
    """
    if _chosen is None:
        text = os.environ.get(_VARIABLE, "")
        if not text:  # `torch.set_num_threads` is then followed, too
            return torch.get_num_threads()
        if not text.isdecimal():
            raise ConfigError(f"{_VARIABLE} must be a number, got {text!r}")
        set_threads(int(text) or torch.get_num_threads())
    assert _chosen is not None
    return _chosen


class _Worker:
    """A thread that waits for one call after the other."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._call: Callable[[], None] | None = None
        self._error: BaseException | None = None
        # bare locks as semaphores: the cheapest way to wake a thread and to wait for it
        self._begin, self._end = threading.Lock(), threading.Lock()
        self._begin.acquire()
        self._end.acquire()
        threading.Thread(target=self._work, name=f"yunmin-kernel-{rank}", daemon=True).start()

    def begin(self, call: Callable[[], None]) -> None:
        self._call = call
        self._begin.release()

    def finish(self) -> BaseException | None:
        self._end.acquire()
        error, self._error = self._error, None
        return error

    def _work(self) -> None:
        while True:
            self._begin.acquire()
            assert self._call is not None
            try:
                self._call()
            except BaseException as error:  # noqa: BLE001 (raised again in the thread that asked)
                self._error = error
            self._call = None  # what the call refers to is not kept alive until the next one
            self._end.release()


_workers: list[_Worker] = []
_busy = threading.Lock()


def run_team(kernel: Callable[..., None], *arguments: Any) -> None:
    """Calls `kernel(*arguments, rank, size)` once for each rank, on `get_threads()` threads; returns when all are done.

    Args:
        kernel: releases the interpreter's lock while it computes.
        arguments: the same for all ranks.
    """
    size = get_threads()
    if size == 1:
        kernel(*arguments, 0, 1)
        return
    with _busy:
        while len(_workers) < size - 1:
            _workers.append(_Worker(len(_workers) + 1))
        team = _workers[: size - 1]
        for rank, worker in enumerate(team, 1):
            worker.begin(lambda rank=rank: kernel(*arguments, rank, size))  # type: ignore[misc]
        errors: list[BaseException | None] = []
        try:
            kernel(*arguments, 0, size)
        finally:
            errors = [worker.finish() for worker in team]
    for error in errors:
        if error is not None:
            raise error


def _forget_team() -> None:
    """A forked child has none of its parent's threads."""
    global _busy
    _workers.clear()
    _busy = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_team)
