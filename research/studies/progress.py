"""What a study shows while it runs: a bar on a terminal, a line per experiment everywhere."""

from __future__ import annotations

import time
from typing import TextIO

from research.reports.words import duration
from research.studies.jobs import Done
from yunmin.terminal_bar import TerminalBar


class Progress(TerminalBar):
    """Lines and a bar.

    Args:
        stream: where to write; None for stderr.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(after="{task.fields[left]}", stream=stream, total=None, left="")
        self._total = self._done = 0
        self._begun = time.monotonic()

    def more(self, count: int) -> None:
        """There are more experiments to be done, base models included."""
        self._total += count
        self.update(total=self._total)

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
        told = f"; {left}" if left and not self.is_drawn else ""
        self.line(f"[{self._done}/{self._total}] {label}: {text}{told}")
        self.update(completed=self._done, left=left)

    def _left(self) -> str:
        """How long it will still take, at the pace so far."""
        left = self._total - self._done
        return f"about {duration((time.monotonic() - self._begun) / self._done * left)} left" if left else ""
