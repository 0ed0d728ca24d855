"""How a run is asked to stop: by SIGINT or SIGTERM, to any process of a team."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from training.records import Screen
from training.team import Team

_LAUNCHER_REPEATS_S = 5.0  # a terminal signals every process, and the launcher its own ones once more


class StopRequest:
    """The first signal asks to stop after the step, a second one stops at once.

    Args:
        team: that trains together, and stops together.
    """

    def __init__(self, team: Team) -> None:
        self.team = team
        self.is_agreed = False
        self._asked = threading.Event()
        self._asked_at = 0.0

    def agree(self) -> bool:
        """Whether any process was asked; all of them must call this after each step."""
        self.is_agreed = self.team.any(self._asked.is_set())
        return self.is_agreed

    @contextmanager
    def heard(self, screen: Screen) -> Iterator[None]:
        """Within it, signals are heard; only in a program's main thread, as Python has it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, _frame: FrameType | None) -> None:
            if self._asked.is_set():
                if self.team.size > 1 and time.monotonic() - self._asked_at < _LAUNCHER_REPEATS_S:
                    return
                raise KeyboardInterrupt
            self._asked_at = time.monotonic()
            self._asked.set()
            screen.line(
                f"{signal.Signals(number).name}: finishing the step and writing a checkpoint; again to stop now"
            )

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
