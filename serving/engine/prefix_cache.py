"""States of prompts that were read, by their token ids, so that the next prompt that begins alike need not be.

A radix tree over token ids: an edge is a run of ids, a node the position at its end. A Mamba state cannot be cut
shorter, so a prefix helps only at positions where a checkpoint (state and logits) was taken: at the end of a prompt and
of an answer, every so many tokens, and exactly where two prompts were seen to part. The tree remembers prompts
without their states, too, for it is they that show where the next one parts.

Checkpoints are evicted by GreedyDual-Size (Cao & Irani 1997): the one that goes has the least sum of the work it saves
per byte and of the time of its last use, measured in what had been evicted by then.
"""

from __future__ import annotations

import heapq
from array import array
from bisect import bisect
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from yunmin.state import MambaState

MIN_TOKENS = 8  # a shorter prefix is read again in less time than its state takes to copy
_TENSOR_BYTES = 1024  # about what a tensor takes beside its numbers: most of it where a model is tiny
_SEEN_TOKENS = 1 << 20  # ids of prompts without a checkpoint that are remembered
_LEAF_TOKENS = 64  # a node takes as much memory as so many ids

# what a lookup found: the whole prompt or part of it; else why not: nothing began alike, what did was not kept at any
# position on the way, or no longer is, or the prompt is too short to be worth it
Outcome = Literal["whole", "part", "unseen", "not_kept", "evicted", "short"]


@dataclass(frozen=True)
class Checkpoint:
    """What is needed to go on after a prefix.

    Attributes:
        position: tokens read.
        state: of batch size 1; never written to.
        logits: (V,), after the last of them.
    """

    position: int
    state: MambaState
    logits: Tensor

    @property
    def nbytes(self) -> int:
        tensors = 1 + len(self.state.conv) + len(self.state.ssm)
        return self.state.nbytes + self.logits.nbytes + tensors * _TENSOR_BYTES


class _Node:
    """A position in the tree; `edge` leads to it from its parent."""

    __slots__ = ("checkpoint", "children", "depth", "edge", "evicted", "parent", "priority", "used")

    def __init__(self, parent: _Node | None, edge: array[int], depth: int) -> None:
        self.parent = parent
        self.edge = edge
        self.depth = depth
        self.children: dict[int, _Node] = {}
        self.checkpoint: Checkpoint | None = None
        self.used = 0.0  # the inflation when its checkpoint was used last
        self.priority = 0.0
        self.evicted = False


class PrefixCache:
    """Checkpoints by the token ids that led to them; used by one thread.

    Args:
        budget_bytes: of states and logits; 0 keeps nothing.
        interval: tokens between the checkpoints within a long prompt.

    Attributes:
        nbytes, checkpoints, evictions: for the metrics; what is held, and how many have given way so far.
    """

    def __init__(self, budget_bytes: int, interval: int) -> None:
        self._budget = budget_bytes
        self._interval = interval
        self._root = _Node(None, array("l"), 0)
        self._inflation = 0.0  # the priority that was evicted last; newcomers start above it
        self._queue: list[
            tuple[float, int, _Node]
        ] = []  # a heap; entries whose priority is no longer the node's are stale
        self._tick = 0
        self._bare: OrderedDict[_Node, None] = OrderedDict()  # leaves without a checkpoint, the oldest first
        self._bare_tokens = 0
        self.nbytes = 0
        self.checkpoints = 0
        self.evictions = 0

    def see(self, ids: Sequence[int]) -> int:
        """Remembers that a prompt goes this way; returns how far an earlier one did."""
        if not self._budget or len(ids) < MIN_TOKENS:
            return 0
        seen = sum(common for _, common in self._walk(ids))
        node = self._node_at(ids)
        if node.checkpoint is None and not node.children:
            self._note_bare(node)
            while self._bare_tokens > _SEEN_TOKENS and len(self._bare) > 1:
                self._prune(next(iter(self._bare)))
        return seen

    def find(self, ids: Sequence[int], seen: int) -> tuple[Checkpoint | None, Outcome]:
        """The deepest checkpoint on the way of `ids`, which counts as used, and what to say of it.

        Args:
            ids: of a prompt.
            seen: what `see` gave when it came.
        """
        best: _Node | None = None
        evicted = False
        for node, common in self._walk(ids):
            if common == len(node.edge):
                best = node if node.checkpoint is not None else best
                evicted |= node.evicted
        if best is not None:
            self._touch(best)
            return best.checkpoint, "whole" if best.depth == len(ids) else "part"
        if len(ids) < MIN_TOKENS:
            return None, "short"
        return None, "evicted" if evicted else "unseen" if seen < MIN_TOKENS else "not_kept"

    def plan(self, ids: Sequence[int], turn_ends: Sequence[int], begin: int) -> list[int]:
        """Where a checkpoint is worth taking while `ids` are read, the last position first.

        Args:
            ids: of a prompt that was seen.
            turn_ends: positions where others are likely to part from it.
            begin: ids that need not be read.
        """
        if not self._budget or len(ids) < MIN_TOKENS:
            return []
        stops: list[int] = []
        for node, common in self._walk(ids):
            if common == len(node.edge) and len(node.children) > 1 and node.depth < len(ids):
                # of partings close together the first one serves all, and none gives way to what is only likely
                _insert_apart(stops, node.depth, begin, len(ids) + MIN_TOKENS)
        stops.append(len(ids))
        for positions in (sorted(turn_ends), range(self._interval, len(ids), self._interval)):
            for position in positions:
                _insert_apart(stops, position, begin, len(ids))
        return stops[::-1]

    def put(self, ids: Sequence[int], state: MambaState, logits: Tensor) -> None:
        """Keeps the checkpoint after `ids`, in place of what there was at that position.

        Args:
            ids: read so far.
            state: of batch size 1; must not be written to any more.
            logits: (V,), memory of their own.
        """
        checkpoint = Checkpoint(len(ids), state, logits)
        if checkpoint.nbytes > self._budget or len(ids) < MIN_TOKENS:
            return
        node = self._node_at(ids)
        if node.checkpoint is not None:
            self._drop_checkpoint(node)
        self._forget_bare(node)
        node.checkpoint, node.evicted = checkpoint, False
        self.nbytes += checkpoint.nbytes
        self.checkpoints += 1
        self._touch(node)
        while self.nbytes > self._budget:
            self._evict()

    def _walk(self, ids: Sequence[int]) -> Iterator[tuple[_Node, int]]:
        """The nodes on the way of `ids`, each with how many ids of its edge agree; the last may agree in part."""
        node, position = self._root, 0
        while position < len(ids):
            child = node.children.get(ids[position])
            if child is None:
                return
            common = _common(child.edge, ids, position)
            yield child, common
            position += common
            if common < len(child.edge):
                return
            node = child

    def _node_at(self, ids: Sequence[int]) -> _Node:
        """The node after `ids`, made where there is none."""
        node, position = self._root, 0
        for child, common in self._walk(ids):
            position += common
            if common < len(child.edge):
                node = self._split(child, common)
                break
            node = child
        if position < len(ids):
            self._forget_bare(node)
            leaf = _Node(node, array("l", ids[position:]), len(ids))
            node.children[ids[position]] = leaf
            node = leaf
        return node

    def _split(self, node: _Node, common: int) -> _Node:
        """Puts a new node after the first `common` ids of a node's edge."""
        parent = node.parent
        assert parent is not None
        middle = _Node(parent, node.edge[:common], node.depth - len(node.edge) + common)
        parent.children[node.edge[0]] = middle
        is_bare = node in self._bare
        self._forget_bare(node)
        node.edge = node.edge[common:]
        node.parent = middle
        middle.children[node.edge[0]] = node
        if is_bare:
            self._note_bare(node)
        return middle

    def _touch(self, node: _Node) -> None:
        """Makes a checkpoint the most recent: its priority is what it saves per byte, above what was evicted last."""
        node.used = self._inflation
        self._queue_up(node, self._worth(node))

    def _worth(self, node: _Node) -> float:
        """The priority of a checkpoint, by the ones that there are before it now."""
        assert node.checkpoint is not None
        ancestor = node.parent
        while ancestor is not None and ancestor.checkpoint is None:
            ancestor = ancestor.parent
        saved = node.depth - (0 if ancestor is None else ancestor.depth)
        return node.used + saved / node.checkpoint.nbytes

    def _queue_up(self, node: _Node, priority: float) -> None:
        node.priority = priority
        self._tick += 1
        heapq.heappush(self._queue, (priority, self._tick, node))
        if len(self._queue) > 64 + 4 * self.checkpoints:  # mostly stale
            self._queue = [entry for entry in self._queue if self._is_current(entry)]
            heapq.heapify(self._queue)

    def _is_current(self, entry: tuple[float, int, _Node]) -> bool:
        return entry[2].checkpoint is not None and entry[0] == entry[2].priority

    def _evict(self) -> None:
        while True:
            entry = heapq.heappop(self._queue)
            if self._is_current(entry):
                node = entry[2]
                if (worth := self._worth(node)) <= node.priority:
                    break
                self._queue_up(node, worth)  # one before it has gone since, whose work it now saves, too
        self._inflation = max(self._inflation, node.priority)
        self.evictions += 1
        self._drop_checkpoint(node)
        node.evicted = True
        if not node.children:
            self._note_bare(node)

    def _drop_checkpoint(self, node: _Node) -> None:
        assert node.checkpoint is not None
        self.nbytes -= node.checkpoint.nbytes
        self.checkpoints -= 1
        node.checkpoint = None

    def _note_bare(self, node: _Node) -> None:
        self._forget_bare(node)
        self._bare[node] = None
        self._bare_tokens += len(node.edge) + _LEAF_TOKENS

    def _forget_bare(self, node: _Node) -> None:
        if node in self._bare:
            del self._bare[node]
            self._bare_tokens -= len(node.edge) + _LEAF_TOKENS

    def _prune(self, node: _Node) -> None:
        """Removes a leaf without a checkpoint, and joins what it leaves behind."""
        self._forget_bare(node)
        parent = node.parent
        assert parent is not None
        del parent.children[node.edge[0]]
        if parent.parent is None or parent.checkpoint is not None:
            return
        if not parent.children:
            self._note_bare(parent)
        elif len(parent.children) == 1:
            (child,) = parent.children.values()
            is_bare = child in self._bare
            self._forget_bare(child)
            child.edge = parent.edge + child.edge
            child.parent = parent.parent
            parent.parent.children[child.edge[0]] = child
            if is_bare:
                self._note_bare(child)


def _insert_apart(stops: list[int], position: int, begin: int, end: int) -> None:
    """Inserts a position into ascending ones, unless one of them or a bound is close by."""
    place = bisect(stops, position)
    before = stops[place - 1] if place else begin
    after = stops[place] if place < len(stops) else end
    if before + MIN_TOKENS <= position <= after - MIN_TOKENS:
        stops.insert(place, position)


def _common(edge: array[int], ids: Sequence[int], position: int) -> int:
    """How many ids of `edge` agree with those from `position` on; at least the first does."""
    length = min(len(edge), len(ids) - position)
    low = 1
    if edge[:length] == array("l", ids[position : position + length]):
        return length
    high = length  # the first disagreement lies in low..high-1; equality of slices is quick
    while low < high:
        middle = (low + high + 1) // 2
        if edge[low:middle] == array("l", ids[position + low : position + middle]):
            low = middle
        else:
            high = middle - 1
    return low
