"""A progress bar on a terminal, with lines above it; plain lines elsewhere."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any, Self, TextIO


class TerminalBar:
    """A bar where the stream is a terminal and `rich` is installed; without one, lines are all that is shown.

    Args:
        before: text before the bar; `{task.fields[name]}` in it stands for a field.
        after: text after it.
        shows_time_left: whether it ends with an estimate of the time left.
        is_transient: whether the bar goes when it ends.
        stream: to write to; None for stderr.
        fields: `total`, `completed`, and first values of the fields in the texts.
    """

    def __init__(
        self,
        before: str = "",
        after: str = "",
        *,
        shows_time_left: bool = False,
        is_transient: bool = False,
        stream: TextIO | None = None,
        **fields: Any,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._bar: Any = None
        if self._stream.isatty() and importlib.util.find_spec("rich") is not None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = [TextColumn(before, markup=False), BarColumn(), MofNCompleteColumn()]
            columns += [TextColumn(after, markup=False)] if after else []
            columns += [TimeRemainingColumn(), TextColumn("left")] if shows_time_left else []
            self._bar = Progress(*columns, console=Console(file=self._stream), transient=is_transient)
            self._task = self._bar.add_task("", **fields)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def is_drawn(self) -> bool:
        """Whether there is a bar."""
        return self._bar is not None

    def line(self, text: str) -> None:
        """Shows a line."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def update(self, **fields: Any) -> None:
        """Changes `total`, `completed` or fields of the texts, where there is a bar."""
        if self._bar is not None:
            self._bar.update(self._task, **fields)

    def restart(self, **fields: Any) -> None:
        """Begins something else, whose time left is estimated anew, where there is a bar."""
        if self._bar is not None:
            self._bar.reset(self._task)
            self._bar.update(self._task, **fields)
