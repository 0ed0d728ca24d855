"""The sequences that step together, and the memory of their states."""

from __future__ import annotations

from torch import Tensor

from serving.engine.sequence import ActiveSequence
from yunmin.runtime import Runtime
from yunmin.state import MambaState


class DecodeBatch:
    """Rows 0..n-1 of one state memory, without holes: whoever leaves gives its row to the last one.

    Who joins costs one copy of a state, who leaves at most one, and a step none.

    Args:
        runtime: steps.
        capacity: most rows.

    Attributes:
        sequences: row by row.
    """

    def __init__(self, runtime: Runtime, capacity: int) -> None:
        self._runtime = runtime
        self._memory = runtime.new_state(capacity)
        self.sequences: list[ActiveSequence] = []
        self._rows: dict[int, MambaState] = {}  # views of the first so many rows: dozens of tensors each

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def add(self, sequence: ActiveSequence, state: MambaState) -> None:
        """Copies a state of batch size 1 into the next row."""
        self._runtime.scatter(self._memory, [len(self.sequences)], state)
        self.sequences.append(sequence)

    def remove(self, sequence: ActiveSequence) -> None:
        row, last = self.sequences.index(sequence), len(self.sequences) - 1
        if row != last:
            self._runtime.scatter(self._memory, [row], self._runtime.gather(self._memory, [last]))
            self.sequences[row] = self.sequences[last]
        self.sequences.pop()  # only now: where the copy fails, nobody has got lost

    def state_of(self, sequence: ActiveSequence) -> MambaState:
        """A copy of its state."""
        return self._runtime.gather(self._memory, [self.sequences.index(sequence)])

    def step(self) -> Tensor:
        """Feeds each sequence its next token; logits (n, V) on the CPU."""
        count = len(self.sequences)
        if (rows := self._rows.get(count)) is None:
            rows = self._rows[count] = self._memory.first_rows(count)
        logits, after = self._runtime.step([s.next_id for s in self.sequences], rows)
        if after is not rows:  # not every runtime writes over what it is given
            self._runtime.scatter(self._memory, range(count), after)
        return logits.float().cpu()  # one copy for all rows
