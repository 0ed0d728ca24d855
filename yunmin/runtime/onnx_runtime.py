"""The onnx runtime: a `Runtime` over an artifact's ONNX graph, on CPUs and, with onnxruntime-gpu, on CUDA."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from yunmin.config import MambaConfig
from yunmin.errors import ArtifactError, RequestError, ShapeError
from yunmin.runtime.onnx_contract import Precision
from yunmin.runtime.onnx_session import Binding, GraphFile, GraphSession
from yunmin.runtime.onnx_state import Layout, OnnxState, StateMemory
from yunmin.state import MambaState
from yunmin.threads import get_threads

_CHUNK_ROWS = 256  # positions computed at once: activations stay small, weights are read once


class OnnxRuntime:
    """Runs a graph in ONNX Runtime; see `Runtime` for the methods.

    No step copies a state: the graph reads them in one place and writes them in another, by turns. Threads may share a
    runtime; their calls take turns. The graph is opened again where `yunmin.threads.get_threads` has changed.

    Args:
        graph: an artifact's, whose files have just been compared with its manifest.
        config: that artifact's.
        device: a CPU or CUDA, see `yunmin.runtime.onnx_session.usable_device`.

    Raises:
        ArtifactError: the graph is damaged, of another model, or has changed.
        ConfigError: it has stacked states, or onnxruntime cannot compute it on the device.
    """

    name = "onnx"

    def __init__(self, graph: GraphFile, config: MambaConfig, device: torch.device) -> None:
        self._graph = graph
        self._config = config
        self._device = device
        self._layout = Layout.of(config)
        self._session = GraphSession(graph, device, get_threads())
        self._working = threading.Lock()  # over the session and the states' bindings
        for field in fields(config):
            expected, found = (getattr(each, field.name) for each in (config, self._session.facts.config))
            if found != expected:
                raise ArtifactError(
                    f"{graph.path}: {field.name}: expected {expected!r} as the artifact has it, found {found!r}"
                )

    @property
    def config(self) -> MambaConfig:
        return self._config

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def precision(self) -> Precision:
        """How the graph's weights are stored."""
        return self._session.facts.precision

    @property
    def weight_bytes(self) -> int:
        """Of the graph's files: beside the weights, they hold some thousands of nodes."""
        return self._graph.nbytes

    def new_state(self, batch_size: int) -> OnnxState:
        return OnnxState.empty(self._layout, batch_size, self._device)

    def prefill(self, token_ids: Sequence[int], state: MambaState | None = None) -> tuple[Tensor, OnnxState]:
        ids = self._ids([list(token_ids)])  # (1, L)
        logits = self._floats(1, 1, self._config.vocab_size)
        return logits[0, 0], self._read("prefill", ids, state, logits)

    def score(self, token_ids: Sequence[int], state: MambaState | None = None) -> tuple[Tensor, OnnxState]:
        ids = self._ids([list(token_ids)])  # (1, L)
        logits = self._floats(1, ids.shape[1], self._config.vocab_size)
        return logits[0], self._read("score", ids, state, logits, all_positions=True)

    def step(self, token_ids: Sequence[int], state: MambaState) -> tuple[Tensor, OnnxState]:
        """As in `Runtime`; a state of this runtime is updated where it is."""
        own = self._on_device(state)
        ids = self._ids([[token_id] for token_id in token_ids])  # (B, 1)
        logits = self._floats(len(token_ids), 1, self._config.vocab_size)
        if own.batch_size != len(token_ids):
            raise ShapeError(f"got tokens of {len(token_ids)} sequences and the states of {own.batch_size}")
        if len(token_ids):
            with self._working:
                self._step(ids, own, logits)
        return logits[:, 0], own

    def forward(self, input_ids: Tensor) -> Tensor:
        if input_ids.dim() != 2 or input_ids.dtype.is_floating_point:
            raise ShapeError(f"forward: expected ids (B, L), got {input_ids.dtype} {tuple(input_ids.shape)}")
        batch, length = input_ids.shape
        logits = self._floats(batch, length, self._config.vocab_size)
        ids = input_ids.to(self._device, torch.int64)
        self._require_known(ids)
        for first in range(0, batch, _CHUNK_ROWS):  # no more sequences at once than rows
            rows = ids[first : first + _CHUNK_ROWS]
            chunk = max(1, _CHUNK_ROWS // rows.shape[0])
            state: OnnxState | None = None
            for begin in range(0, length, chunk):
                part = rows[:, begin : begin + chunk].contiguous()
                found = self._floats(*part.shape, self._config.vocab_size)
                state = self._advance(part, self.new_state(len(rows)) if state is None else state, found, kept=0)
                logits[first : first + len(part), begin : begin + part.shape[1]] = found
        return logits

    def gather(self, pool: MambaState, slots: Sequence[int]) -> OnnxState:
        gathered = pool.gather(slots)
        return gathered if isinstance(gathered, OnnxState) else self._copied(gathered)

    def scatter(self, pool: MambaState, slots: Sequence[int], state: MambaState) -> None:
        pool.scatter_(slots, state)

    def _read(
        self, what: str, ids: Tensor, state: MambaState | None, logits: Tensor, *, all_positions: bool = False
    ) -> OnnxState:
        """Reads ids (1, L) after a state, which stays as it is; fills logits (1, 1 or L, V)."""
        if ids.shape[1] == 0:
            raise ShapeError(f"{what}: expected at least one token")
        current = self.new_state(1) if state is None else self._on_device(state)
        if current.batch_size != 1:
            raise ShapeError(f"{what}: expected the state of one sequence, got {current.batch_size}")
        for begin in range(0, ids.shape[1], _CHUNK_ROWS):
            part = ids[:, begin : begin + _CHUNK_ROWS]
            found = logits[:, begin : begin + part.shape[1]] if all_positions else logits
            current = self._advance(part, current, found, kept=0 if all_positions else 1)
        return current

    def _advance(self, ids: Tensor, state: OnnxState, logits: Tensor, *, kept: int) -> OnnxState:
        """Reads ids (B, T) after a state, which stays as it is; fills logits (B, kept or T, V)."""
        after = StateMemory(self._layout, state.batch_size, self._device, zeros=False)
        with self._working:
            here = (state.memory, state.memory.settle(state.rows))
            Binding(self._current_session(), state.batch_size, here, (after, 0), kept).run(ids, logits)
        return OnnxState(after, state.batch_size)

    def _step(self, ids: Tensor, state: OnnxState, logits: Tensor) -> None:
        """Writes the next states of the rows over those of the step before the last."""
        memory, count, session = state.memory, state.batch_size, self._current_session()
        session.step_binding(memory, count, memory.settle(state.rows)).run(ids, logits)
        memory.turn(count)

    def _current_session(self) -> GraphSession:
        threads = get_threads()
        if self._session.threads != threads:
            self._graph.require_unchanged()
            self._session = GraphSession(self._graph, self._device, threads)
        return self._session

    def _on_device(self, state: MambaState) -> OnnxState:
        self._layout.require_fit(state)
        here = isinstance(state, OnnxState) and state.memory.device == self._device
        return state if here and isinstance(state, OnnxState) else self._copied(state)

    def _copied(self, state: MambaState) -> OnnxState:
        return OnnxState.copied(self._layout, state, self._device)

    def _ids(self, rows: Sequence[Sequence[int]]) -> Tensor:
        ids = torch.tensor(rows, dtype=torch.int64, device="cpu")
        self._require_known(ids)
        return ids if self._device.type == "cpu" else ids.to(self._device)

    def _require_known(self, ids: Tensor) -> None:
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self._config.vocab_size):
            raise RequestError("token_ids", f"must lie in 0..{self._config.vocab_size - 1}")

    def _floats(self, *shape: int) -> Tensor:
        """Memory for the graph to fill, whatever torch's defaults are."""
        return torch.empty(*shape, dtype=torch.float32, device=self._device)
