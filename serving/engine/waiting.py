"""The line before the slots: who is admitted next, and who has left it."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from serving.engine.sequence import ActiveSequence
from yunmin.state import MambaState


class WaitingLine:
    """Sequences in the order in which they are due.

    Of siblings, which share a prompt, the first one comes alone and reads it; the others wait with it, and go on from
    its state, or one of them takes over where it leaves early.

    Attributes:
        count: who waits, siblings included.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, ActiveSequence]] = []
        self._arrivals = 0
        self._leaders: list[ActiveSequence] = []  # admitted, with siblings that wait
        self.count = 0

    def add(self, sequence: ActiveSequence) -> None:
        """Adds a sequence with its siblings."""
        self.count += 1 + len(sequence.siblings)
        self._push(sequence)

    def pop(self) -> ActiveSequence | None:
        """The one that is due, or None."""
        if not self._heap:
            return None
        sequence = heapq.heappop(self._heap)[2]
        self.count -= 1
        if sequence.siblings:
            self._leaders.append(sequence)
        return sequence

    def go_on(self, leader: ActiveSequence, state: MambaState) -> None:
        """Its prompt is read: its siblings are due with that state."""
        for sibling in self._siblings_of(leader):
            sibling.go_on_from(leader.read, state, leader.logits)
            self._push(sibling)

    def hand_over(self, leader: ActiveSequence) -> None:
        """It has left before its prompt was read: a sibling is due in its place."""
        if siblings := self._siblings_of(leader):
            siblings[0].siblings = siblings[1:]
            self._push(siblings[0])

    def keep(self, stays: Callable[[ActiveSequence], bool]) -> None:
        """Asks everyone once, and drops who does not stay."""
        leading = [sequence for _, _, sequence in self._heap]
        everyone = [*leading, *(s for leader in leading + self._leaders for s in leader.siblings)]
        gone = {sequence for sequence in everyone if not stays(sequence)}
        if not gone:
            return
        line, self._heap = sorted(self._heap, key=lambda entry: entry[:2]), []
        self.count = 0
        for _, _, sequence in line:
            staying = [s for s in (sequence, *sequence.siblings) if s not in gone]
            if staying:
                staying[0].siblings = staying[1:]
                self.add(staying[0])
        for leader in self._leaders:
            leader.siblings = [s for s in leader.siblings if s not in gone]
            self.count += len(leader.siblings)
        self._leaders = [leader for leader in self._leaders if leader.siblings]

    def _siblings_of(self, leader: ActiveSequence) -> list[ActiveSequence]:
        if leader.siblings:
            self._leaders.remove(leader)
        siblings, leader.siblings = leader.siblings, []
        return siblings

    def _push(self, sequence: ActiveSequence) -> None:
        self._arrivals += 1
        heapq.heappush(self._heap, (sequence.due, self._arrivals, sequence))
