"""Decode steps as CUDA graphs: the hundreds of kernels of a small step take longer to launch than to run."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from yunmin.model import MambaLM
from yunmin.runtime.torch_runtime import TorchRuntime
from yunmin.state import MambaState

_EAGER_STEPS = 2  # over one memory before it is captured: they warm the kernels up, and many states see no more steps
_MOST_GRAPHS = 128  # one per batch size and memory

# where a state lies, and how many rows of it
Place = tuple[int, ...]


@dataclass(frozen=True)
class _Captured:
    """A step over one memory: ids (B,) in, states updated where they lie, logits (B, V) out."""

    graph: torch.cuda.CUDAGraph
    token_ids: Tensor
    logits: Tensor


class CudaGraphRuntime(TorchRuntime):
    """Runs a `MambaLM` on a CUDA device; steps over the same memory are replayed from their third one on.

    `step` writes the next states over those given. An engine steps over the first rows of one memory, so it needs
    one graph per number of rows.
    """

    name = "torch"

    def __init__(self, model: MambaLM) -> None:
        super().__init__(model)
        self._stepping = threading.Lock()  # over the graphs' own inputs and outputs
        self._seen: OrderedDict[Place, int] = OrderedDict()
        self._captured: OrderedDict[Place, _Captured] = OrderedDict()

    @torch.inference_mode()
    def step(self, token_ids: Sequence[int], state: MambaState) -> tuple[Tensor, MambaState]:
        ids = torch.tensor(list(token_ids), dtype=torch.int64, device=self.device)
        with self._stepping:
            return self._step(ids, state), state

    def _step(self, ids: Tensor, state: MambaState) -> Tensor:
        place = _place_of(state)
        captured = self._captured.get(place)
        if captured is None:
            if self._count(place) <= _EAGER_STEPS:
                return self._step_in_place(ids, state)
            captured = self._capture(ids, state)
            self._captured[place] = captured
            if len(self._captured) > _MOST_GRAPHS:
                self._captured.popitem(last=False)
        self._captured.move_to_end(place)
        captured.token_ids.copy_(ids)
        captured.graph.replay()
        return captured.logits.clone()  # the next replay writes over its own

    def _step_in_place(self, ids: Tensor, state: MambaState) -> Tensor:
        logits, after = self.model.step(ids, state)
        for mine, theirs in zip(state.conv + state.ssm, after.conv + after.ssm, strict=True):
            mine.copy_(theirs)
        return logits

    def _capture(self, ids: Tensor, state: MambaState) -> _Captured:
        """Records a step; capturing computes nothing, so the states stay as they are."""
        token_ids = ids.clone()
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may allocate and copy meanwhile (sessions are restored and saved by them)
        capture = torch.cuda.graph(graph, capture_error_mode="thread_local")
        with torch.cuda.device(self.device), capture:
            logits = self._step_in_place(token_ids, state)
        return _Captured(graph, token_ids, logits)

    def _count(self, place: Place) -> int:
        """How many steps this memory has seen, this one included."""
        count = self._seen.pop(place, 0) + 1
        self._seen[place] = count
        if len(self._seen) > 4 * _MOST_GRAPHS:
            self._seen.popitem(last=False)
        return count


def _place_of(state: MambaState) -> Place:
    tensors = state.conv + state.ssm
    return (state.batch_size, *(tensor.data_ptr() for tensor in tensors))
