"""How far a long computation is, on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import importlib.util
import sys
import time
from types import TracebackType
from typing import Any, Self

_SAID_S = 10.0  # between two lines where there is no terminal


class ProgressBar:
    """Shows one thing at a time: call it with what is done, how much of it, and of how much."""

    def __init__(self) -> None:
        self._what = ""
        self._task: Any = None
        self._said = time.monotonic()
        self._stderr = sys.stderr
        self._bar: Any = None
        if sys.stderr.isatty() and importlib.util.find_spec("rich") is not None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._bar is not None:
            if what != self._what:
                for task in self._bar.task_ids:
                    self._bar.remove_task(task)
                self._task = self._bar.add_task(what, total=total)
            self._bar.update(self._task, completed=done, total=total)
        elif time.monotonic() - self._said >= _SAID_S:
            self._said = time.monotonic()
            print(f"yunmin: {done:,} of {total:,} {what}", file=self._stderr, flush=True)
        self._what = what
