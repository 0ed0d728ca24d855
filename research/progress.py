"""How far a long computation is, on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time

from yunmin.terminal_bar import TerminalBar

_SAID_S = 10.0  # between two lines where there is no terminal


class ProgressBar(TerminalBar):
    """Shows one thing at a time: call it with what is done, how much of it, and of how much."""

    def __init__(self) -> None:
        super().__init__("{task.fields[what]}", shows_time_left=True, is_transient=True, what="", visible=False)
        self._what = ""
        self._said = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self.restart(what=what, total=total, visible=True)
        self._what = what
        self.update(completed=done, total=total)
        if not self.is_drawn and time.monotonic() - self._said >= _SAID_S:
            self._said = time.monotonic()
            self.line(f"yunmin: {done:,} of {total:,} {what}")
