"""What a study shows while it runs: a bar on a terminal, a line per experiment everywhere."""

from __future__ import annotations

import sys
import time
from typing import Any, Self, TextIO

from research.reports.words import duration
from research.studies.jobs import Done
from yunmin.errors import MissingExtraError


class Progress:
    """Lines and a bar.

    Args:
        stream: where to write; None for stderr.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._total = self._done = 0
        self._begun = time.monotonic()
        self._bar: Any = None
        if self._stream.isatty():
            try:
                from rich.console import Console
                from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
                from rich.progress import Progress as Bar
            except ModuleNotFoundError:
                raise MissingExtraError("rich", "research", "the progress bar") from None
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
            self._bar = Bar(*columns, console=Console(file=self._stream))
            self._task = self._bar.add_task("", left="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def line(self, text: str) -> None:
        """Shows a line."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def more(self, count: int) -> None:
        """There are more experiments to be done, base models included."""
        self._total += count
        if self._bar is not None:
            self._bar.update(self._task, total=self._total)

    def finished(self, done: Done) -> None:
        """Shows how an experiment ended."""
        self._done += 1
        label = done.job.experiment.label
        if done.result is None:
            text = f"failed: {done.error}"
        else:
            seconds = sum(done.result["seconds"].values())
            text = f"test perplexity {done.result['test']['token_perplexity']:.3f}, {duration(seconds)}"
        left = self._left()
        self.line(f"[{self._done}/{self._total}] {label}: {text}{f'; {left}' if left and self._bar is None else ''}")
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, left=left)

    def _left(self) -> str:
        """How long it will still take, at the pace so far."""
        left = self._total - self._done
        return f"about {duration((time.monotonic() - self._begun) / self._done * left)} left" if left else ""
