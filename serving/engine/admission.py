"""Who may come in: the one place where callers and the engine's thread meet."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from serving.engine.job import EngineStoppedError, Load, QueueFullError
from serving.engine.sequence import ActiveSequence
from serving.engine.waiting import WaitingLine
from yunmin.state import MambaState

_LONGEST_RETRY_S = 60


class Admission:
    """A bounded line before a number of slots; threads may share it.

    Args:
        slots: sequences that may be read or generate at once.
        queue: sequences that may wait beyond those.
    """

    def __init__(self, slots: int, queue: int) -> None:
        self._slots = slots
        self._queue = queue
        self._changed = threading.Condition()  # guards all below
        self._line = WaitingLine()
        self._free = slots
        self._draining = False
        self._stopped = ""
        self._typical_s = 1.0  # how long a sequence holds its slot, a moving average

    @property
    def load(self) -> Load:
        with self._changed:
            return Load(self._slots - self._free, self._line.count)

    @property
    def is_open(self) -> bool:
        """Whether newcomers are let in, if there is room."""
        return not self._draining and not self._stopped

    @property
    def is_draining(self) -> bool:
        return self._draining

    @property
    def is_stopped(self) -> bool:
        return bool(self._stopped)

    def drain(self) -> None:
        """Refuses newcomers from here on."""
        self._draining = True

    def stop(self, reason: str) -> None:
        """Refuses newcomers for this reason, and wakes the thread; the first reason given stays."""
        with self._changed:
            self._stopped = self._stopped or reason
            self._changed.notify()

    def notify(self) -> None:
        """Wakes the thread: someone has left."""
        with self._changed:
            self._changed.notify()

    def enter(self, sequences: list[ActiveSequence]) -> None:
        """Lets sequences of one prompt in together.

        Raises:
            QueueFullError: there is no room for all of them.
            EngineStoppedError: nobody is let in any more.
        """
        with self._changed:
            if not self.is_open:
                raise EngineStoppedError(self._stopped or "the engine is shutting down")
            if self._line.count + len(sequences) > self._queue + self._free:
                turns = (self._line.count + len(sequences)) / self._slots
                raise QueueFullError(min(_LONGEST_RETRY_S, max(1, math.ceil(self._typical_s * turns))))
            sequences[0].siblings = sequences[1:]
            self._line.add(sequences[0])
            self._changed.notify()

    def wait(self, is_busy: Callable[[], bool]) -> bool:
        """Called by the thread: sleeps while nobody waits and it is not busy; false when it is time to stop."""
        with self._changed:
            while not (self._stopped or self._line.count or is_busy()):
                self._changed.wait()
            return not self._stopped

    def admit(self) -> list[ActiveSequence]:
        """Those who get a slot now."""
        admitted = []
        with self._changed:
            while self._free and (sequence := self._line.pop()) is not None:
                self._free -= 1
                sequence.stream.timings.admitted = time.monotonic()
                admitted.append(sequence)
        return admitted

    def leave(self, sequence: ActiveSequence) -> None:
        """A sequence has ended; its slot is free."""
        timings = sequence.stream.timings
        with self._changed:
            if timings.admitted:
                self._free += 1
                self._typical_s += 0.2 * (timings.finished - timings.admitted - self._typical_s)

    def go_on(self, leader: ActiveSequence, state: MambaState) -> None:
        """As `WaitingLine.go_on`."""
        with self._changed:
            self._line.go_on(leader, state)

    def hand_over(self, leader: ActiveSequence) -> None:
        """As `WaitingLine.hand_over`."""
        with self._changed:
            self._line.hand_over(leader)

    def keep(self, stays: Callable[[ActiveSequence], bool]) -> None:
        """As `WaitingLine.keep`."""
        with self._changed:
            self._line.keep(stays)
