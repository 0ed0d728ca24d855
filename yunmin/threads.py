"""One number of threads for everything that computes on the CPU, and the team that runs native kernels.

A kernel is a compiled function that releases the interpreter's lock and takes `rank` and `size` as its last
arguments; a team calls it once per thread, and each call does its share. Work is divided by position, never by who is
first, so a result depends on the number of threads at most, not on their luck.
"""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

import yunmin
from yunmin.errors import ConfigError

if yunmin._chose_to_wait:
    os.environ.pop("OMP_WAIT_POLICY", None)

_VARIABLE = "YUNMIN_THREADS"
_MOST = 1024
_chosen: int | None = None


def set_threads(count: int) -> None:
    """Sets how many threads torch and the native kernels use, from here on.

    Raises:
        ConfigError: `count` is no integer in 1..1024.
    """
    global _chosen
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _MOST:
        raise ConfigError(f"threads must be an integer in 1..{_MOST}, got {count!r}")
    torch.set_num_threads(count)
    _chosen = count


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
        self.call: Callable[[], None] | None = None
        self.error: BaseException | None = None
        # bare locks as semaphores: the cheapest way to wake a thread and to wait for it
        self.begin, self.end = threading.Lock(), threading.Lock()
        self.begin.acquire()
        self.end.acquire()
        threading.Thread(target=self._work, name=f"yunmin-kernel-{rank}", daemon=True).start()

    def _work(self) -> None:
        while True:
            self.begin.acquire()
            assert self.call is not None
            try:
                self.call()
            except BaseException as error:  # noqa: BLE001 (raised again in the thread that asked)
                self.error = error
            self.call = None  # what the call refers to is not kept alive until the next one
            self.end.release()


_workers: list[_Worker] = []
_busy = threading.Lock()


def run_team(kernel: Callable[..., None], *arguments: Any, size: int | None = None) -> None:
    """Calls `kernel(*arguments, rank, size)` once for each rank; returns when all are done, Ctrl-C or not.

    Args:
        kernel: releases the interpreter's lock while it computes.
        arguments: the same for all ranks.
        size: threads in the team; None for `get_threads()`.
    """
    if size is None:
        size = get_threads()
    if size == 1:
        kernel(*arguments, 0, 1)
        return
    with _busy:
        while len(_workers) < size - 1:
            _workers.append(_Worker(len(_workers) + 1))
        team = _workers[: size - 1]
        for rank, worker in enumerate(team, 1):
            worker.call, worker.error = partial(kernel, *arguments, rank, size), None
        own = partial(kernel, *arguments, 0, size)
        errors = _call_all([*(w.begin.release for w in team), own, *(w.end.acquire for w in team)])
        errors += [worker.error for worker in team if worker.error is not None]
    if errors:
        raise errors[0]


def _call_all(steps: Sequence[Callable[[], Any]]) -> list[BaseException]:
    """Calls each of `steps` in order, whatever any of them raises; returns what they raised.

    A team that was only begun would wait for its missing part for ever, in memory that is no longer its own. Python
    handles signals between its own instructions, so a list calls the steps and counts those that are done; a step that
    a signal interrupted (a wait) is called again.
    """
    errors: list[BaseException] = []
    done: list[Any] = []
    while len(done) < len(steps):
        try:
            done.extend(map(operator.call, steps[len(done) :]))
        except Exception as error:  # noqa: BLE001 (raised again by the caller)
            errors.append(error)
            done.append(None)
        except BaseException as interrupt:  # noqa: BLE001 (likewise)
            errors.append(interrupt)
    return errors


def _forget_team() -> None:
    """A forked child has none of its parent's threads."""
    global _busy
    _workers.clear()
    _busy = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_team)
