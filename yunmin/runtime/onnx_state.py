"""States as an ONNX graph takes them: layer after layer, in memory that two steps take turns to read and to write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from yunmin.config import MambaConfig
from yunmin.runtime.onnx_contract import state_tensors
from yunmin.state import MambaState, require_widths

_ALIGNMENT = 16  # numbers: a tensor begins where a line of the cache does


@dataclass(frozen=True)
class Layout:
    """Shapes of a sequence's states, in the graph's order: of each layer the convolution's, then the scan's.

    Attributes:
        taps: inputs of the convolution that are carried, K-1.
        d_inner, d_state: widths of each layer.
        shapes: of each tensor, without the batch: (K-1, D) and (N, D) by turns.
    """

    taps: int
    d_inner: tuple[int, ...]
    d_state: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, config: MambaConfig) -> Layout:
        """The layout of a model's states."""
        shapes = tuple(tensor.shape for tensor in state_tensors(config, "layers"))
        return cls(config.d_conv - 1, config.d_inner, config.d_state, shapes)

    @property
    def numbers(self) -> int:
        """Of one sequence."""
        return sum(map(prod, self.shapes))

    def require_fit(self, state: MambaState) -> None:
        """Raises StateError for a state of other widths; names the first layer that differs."""
        if isinstance(state, OnnxState) and (state.memory.layout is self or state.memory.layout == self):
            return
        require_widths(state, self.d_inner, self.d_state, self.taps)


class StateMemory:
    """Room for the states of some rows, twice: a step reads a row's state on one side and writes it on the other.

    The other side is allocated with the first step. Each row is on the side that holds its state; the rows of a step
    must be on one, and are brought there if they are not. Whether torch is in inference mode makes no difference.

    Args:
        layout: of a row.
        rows: to have room for.
        device: where.
        zeros: whether the states are those before the first token; else they are still to be written.

    Attributes:
        layout, rows, device: as above.
        begins: where each tensor (rows, *shape) begins among a side's numbers.
    """

    def __init__(self, layout: Layout, rows: int, device: torch.device, *, zeros: bool = True) -> None:
        self.layout, self.rows, self.device = layout, rows, device
        self.begins: list[int] = []
        self._numbers = 0
        for shape in layout.shapes:
            self.begins.append(self._numbers)
            self._numbers += -(-rows * prod(shape) // _ALIGNMENT) * _ALIGNMENT
        self._sides: list[Tensor | None] = [self._room(torch.zeros if zeros else torch.empty), None]
        self._views: list[list[Tensor]] = [[], []]
        self._side_of = [0] * rows

    def side(self, side: int) -> Tensor:
        """The numbers of a side (n,)."""
        found = self._sides[side]
        if found is None:
            found = self._sides[side] = self._room(torch.empty)
        return found

    def tensors(self, side: int) -> list[Tensor]:
        """A side's states (rows, *shape), by layout; views."""
        if not self._views[side]:
            numbers = self.side(side)
            with torch.inference_mode(False):
                self._views[side] = [
                    numbers[begin : begin + self.rows * prod(shape)].view(self.rows, *shape)
                    for begin, shape in zip(self.begins, self.layout.shapes, strict=True)
                ]
        return self._views[side]

    def settle(self, rows: Sequence[int]) -> int:
        """Brings rows to one side, which is returned."""
        sides = [self._side_of[row] for row in rows]
        if not sides or sides.count(sides[0]) == len(sides):
            return sides[0] if sides else 0
        side = max((0, 1), key=sides.count)
        strays = [row for row in rows if self._side_of[row] != side]
        index = torch.tensor(strays, dtype=torch.int64, device=self.device)
        for mine, theirs in zip(self.tensors(side), self.tensors(1 - side), strict=True):
            mine.index_copy_(0, index, theirs.index_select(0, index))
        self._note(strays, side)
        return side

    def turn(self, count: int) -> None:
        """The first rows have been written on their other side."""
        self._note(range(count), 1 - self._side_of[0])

    @torch.no_grad()
    def write(self, rows: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """Writes states (n, *shape), by layout, of any float type and device, over rows."""
        if not rows:
            return
        side = self._side_of[0]  # where those are that they may step with
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.device)
        for mine, theirs in zip(self.tensors(side), tensors, strict=True):
            mine.index_copy_(0, index, theirs.to(mine))
        self._note(rows, side)

    def copied(self, rows: Sequence[int]) -> StateMemory:
        """The states of some rows, in that order, in memory of their own."""
        copy = StateMemory(self.layout, len(rows), self.device, zeros=False)
        side = self.settle(rows)
        if list(rows) == list(range(self.rows)):
            copy.side(0).copy_(self.side(side))
            return copy
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.device)
        for mine, theirs in zip(copy.tensors(0), self.tensors(side), strict=True):
            torch.index_select(theirs, 0, index, out=mine)
        return copy

    def _room(self, make: Callable[..., Tensor]) -> Tensor:
        with torch.inference_mode(False):
            return make(self._numbers, dtype=torch.float32, device=self.device)

    def _note(self, rows: Sequence[int], side: int) -> None:
        for row in rows:
            self._side_of[row] = side


class OnnxState(MambaState):
    """A `MambaState` in a `StateMemory`: its first rows.

    A step changes on which side the states lie: `conv` and `ssm` are views of where they are now, and `nbytes` counts
    that side only.

    Args:
        memory: may be shared with others that have more of its rows, or fewer.
        rows: how many; the attribute has their numbers.
    """

    memory: StateMemory
    rows: range

    def __init__(self, memory: StateMemory, rows: int) -> None:
        object.__setattr__(self, "memory", memory)
        object.__setattr__(self, "rows", range(rows))

    @classmethod
    def empty(cls, layout: Layout, rows: int, device: torch.device) -> OnnxState:
        """The states before the first token."""
        return cls(StateMemory(layout, rows, device), rows)

    @classmethod
    def copied(cls, layout: Layout, state: MambaState, device: torch.device) -> OnnxState:
        """A copy of any state of the same widths.

        Raises:
            StateError: it has others.
        """
        layout.require_fit(state)
        if isinstance(state, OnnxState) and state.memory.device == device:
            return state.copy()
        memory = StateMemory(layout, state.batch_size, device, zeros=False)
        memory.write(range(state.batch_size), graph_tensors(state))
        return cls(memory, state.batch_size)

    @property
    def conv(self) -> tuple[Tensor, ...]:
        """Each (B, D, K-1)."""
        return tuple(tensor.transpose(1, 2) for tensor in self.tensors()[0::2])

    @property
    def ssm(self) -> tuple[Tensor, ...]:
        """Each (B, D, N)."""
        return tuple(tensor.transpose(1, 2) for tensor in self.tensors()[1::2])

    @property
    def batch_size(self) -> int:
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        return len(self.rows) * self.memory.layout.numbers * torch.float32.itemsize

    def tensors(self) -> list[Tensor]:
        """The states (B, *shape) where they lie, by layout."""
        side = self.memory.settle(self.rows)
        return [tensor[: len(self.rows)] for tensor in self.memory.tensors(side)]

    def copy(self) -> OnnxState:
        return self.gather(self.rows)

    def to(self, device: torch.device | str) -> MambaState:
        return self if torch.device(device) == self.memory.device else super().to(device)

    def gather(self, rows: Sequence[int]) -> OnnxState:
        self._require_rows(rows)
        return OnnxState(self.memory.copied(rows), len(rows))

    def first_rows(self, count: int) -> OnnxState:
        return OnnxState(self.memory, len(self.rows[:count]))

    def scatter_(self, rows: Sequence[int], source: MambaState) -> None:
        self._require_rows(rows)
        self.memory.layout.require_fit(source)
        self.memory.write(rows, graph_tensors(source))

    def _require_rows(self, rows: Sequence[int]) -> None:
        for row in rows:
            if row not in self.rows:
                raise IndexError(f"row {row}: expected one of 0..{len(self.rows) - 1}")


def graph_tensors(state: MambaState) -> list[Tensor]:
    """A state's tensors in the graph's order and shapes; views."""
    if isinstance(state, OnnxState):
        return state.tensors()
    pairs = zip(state.conv, state.ssm, strict=True)
    return [tensor.transpose(1, 2) for pair in pairs for tensor in pair]
