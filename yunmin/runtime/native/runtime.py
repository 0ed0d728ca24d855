"""The native runtime: a `Runtime` for CPUs."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from yunmin.checkpoint import Checkpoint
from yunmin.config import MambaConfig
from yunmin.errors import RequestError, ShapeError
from yunmin.kernels.barrier import BARRIER_NUMBERS
from yunmin.kernels.matmul import (
    ACTIVATION_FIELDS,
    BYTES,
    SCALE,
    START4,
    START8,
    TILE_NUMBERS,
    VALUES,
    WEIGHTS,
    WIDTH,
)
from yunmin.kernels.tile import GROUP
from yunmin.kernels.vector import LANES
from yunmin.runtime.native import records
from yunmin.runtime.native.network import run_network
from yunmin.runtime.native.records import padded
from yunmin.runtime.native.state import NativeState, require_fit
from yunmin.runtime.native.weights import NativeWeights, Record, prepare_weights
from yunmin.state import MambaState
from yunmin.threads import get_threads, run_team

_ALONE_BYTES = 4 << 20  # of weights times rows: a thread reads as much in the time in which a team wakes up
_CHUNK_ROWS = 256  # positions computed at once: their activations stay in the cache, their weights are read once


class NativeRuntime:
    """Runs a checkpoint on the CPU in native code; see `Runtime` for the methods.

    Float32, int8 and int4 weights. A row's logits and states depend neither on the other rows of a batch nor on how a
    sequence is cut into chunks and steps: they are the same to the last bit. Threads may share a runtime; their calls
    take turns.

    Args:
        checkpoint: as stored.
    """

    name = "native"

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._weights = prepare_weights(checkpoint.config, checkpoint.quantization, checkpoint.tensors)
        self._scratch = Scratch(self._weights, 1, get_threads())
        self._working = threading.Lock()  # over the scratch memory

    @property
    def config(self) -> MambaConfig:
        return self._weights.config

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @cached_property
    def weight_bytes(self) -> int:
        sizes = {tensor.data_ptr(): tensor.nbytes for tensor in self._weights.kept}
        model = self._weights.model
        table, head = (int(model[record + WEIGHTS]) for record in (records.EMBEDDING, records.HEAD))
        if self.config.tie_word_embeddings and table != head:
            del sizes[table]  # of float32, the head packed is a copy
        return sum(sizes.values())

    def new_state(self, batch_size: int) -> NativeState:
        return NativeState.empty(self._weights.states, batch_size)

    def prefill(self, token_ids: Sequence[int], state: MambaState | None = None) -> tuple[Tensor, NativeState]:
        if len(token_ids) == 0:
            raise ShapeError("prefill: expected at least one token")
        own = self.new_state(1) if state is None else NativeState.copied(self._weights.states, state)
        ids = np.asarray([token_ids], np.int64)  # (1, L)
        logits = _floats(1, self._weights.logits_width)
        for begin in range(0, ids.shape[1], _CHUNK_ROWS):
            self._run(ids[:, begin : begin + _CHUNK_ROWS], own, logits)
        return logits[0, : self.config.vocab_size], own

    def score(self, token_ids: Sequence[int], state: MambaState | None = None) -> tuple[Tensor, NativeState]:
        if len(token_ids) == 0:
            raise ShapeError("score: expected at least one token")
        own = self.new_state(1) if state is None else NativeState.copied(self._weights.states, state)
        ids = np.asarray([token_ids], np.int64)  # (1, L)
        logits = _floats(ids.shape[1], self._weights.logits_width)
        for begin in range(0, ids.shape[1], _CHUNK_ROWS):
            self._run(ids[:, begin : begin + _CHUNK_ROWS], own, logits[begin:], all_positions=True)
        return logits[:, : self.config.vocab_size], own

    def step(self, token_ids: Sequence[int], state: MambaState) -> tuple[Tensor, NativeState]:
        """As in `Runtime`; a native state is updated in place."""
        require_fit(self._weights.states, state)
        own = state if isinstance(state, NativeState) else NativeState.copied(self._weights.states, state)
        logits = _floats(len(token_ids), self._weights.logits_width)
        self._run(np.asarray(token_ids, np.int64)[:, None], own, logits)
        return logits[:, : self.config.vocab_size], own

    def forward(self, input_ids: Tensor) -> Tensor:
        if input_ids.dim() != 2 or input_ids.dtype.is_floating_point:
            raise ShapeError(f"forward: expected ids (B, L), got {input_ids.dtype} {tuple(input_ids.shape)}")
        batch, length = input_ids.shape
        logits = _floats(batch, length, self.config.vocab_size)
        ids = input_ids.to("cpu", torch.int64).numpy()
        for first in range(0, batch, _CHUNK_ROWS):  # no more sequences at once than rows
            rows = ids[first : first + _CHUNK_ROWS]
            state = self.new_state(rows.shape[0])
            chunk = max(1, _CHUNK_ROWS // rows.shape[0])
            for begin in range(0, length, chunk):
                part = rows[:, begin : begin + chunk]
                wide = _floats(part.size, self._weights.logits_width)
                self._run(part, state, wide, all_positions=True)
                logits[first : first + part.shape[0], begin : begin + part.shape[1]] = wide[
                    :, : self.config.vocab_size
                ].view(*part.shape, -1)
        return logits

    def gather(self, pool: MambaState, slots: Sequence[int]) -> NativeState:
        gathered = pool.gather(slots)
        return gathered if isinstance(gathered, NativeState) else NativeState.copied(self._weights.states, gathered)

    def scatter(self, pool: MambaState, slots: Sequence[int], state: MambaState) -> None:
        pool.scatter_(slots, state)

    def _run(self, ids: np.ndarray, state: NativeState, logits: Tensor, *, all_positions: bool = False) -> None:
        """Reads ids (B, T), T >= 1; updates the state; fills logits (B or B*T, width)."""
        batch = ids.shape[0]
        if state.batch_size != batch:
            raise ShapeError(f"got tokens of {batch} sequences and the states of {state.batch_size}")
        if batch == 0:
            return
        if int(ids.min()) < 0 or int(ids.max()) >= self.config.vocab_size:  # the kernel reads whatever lies there
            raise RequestError("token_ids", f"must lie in 0..{self.config.vocab_size - 1}")
        with self._working:
            self._compute(ids, state, logits, all_positions=all_positions)

    def _compute(self, ids: np.ndarray, state: NativeState, logits: Tensor, *, all_positions: bool) -> None:
        batch, length = ids.shape
        threads = get_threads()
        if self._scratch.rows < ids.size or self._scratch.threads != threads:
            self._scratch = Scratch(self._weights, max(ids.size, self._scratch.rows), threads)
        run_team(
            run_network,
            self._weights.model,
            self._weights.layers,
            self._scratch.record,
            self._scratch.step_sizes,
            np.ascontiguousarray(ids).reshape(-1),
            batch,
            length,
            state.memory.data_ptr(),
            self.config.norm_eps,
            logits.data_ptr(),
            all_positions,
            # not what the setting is by now: the scratch memory is for so many; and little work is done sooner alone
            size=1 if ids.size * self.weight_bytes < _ALONE_BYTES else threads,
        )


class Scratch:
    """Memory for the activations of a number of rows, allocated once.

    Attributes:
        rows: positions there is room for.
        threads: of the team that works in it.
        record: describes it.
        step_sizes: int64 (threads, ACTIVATION_FIELDS), each thread's own activations.

    Args:
        weights: decide the widths.
        rows, threads: as above.
    """

    def __init__(self, weights: NativeWeights, rows: int, threads: int) -> None:
        config = weights.config
        self.rows = rows
        self.threads = threads
        self.record: Record = np.zeros(records.SCRATCH_FIELDS, np.int64)
        self.step_sizes: Record = np.zeros((threads, ACTIVATION_FIELDS), np.int64)
        self._kept: list[Tensor] = []
        inner = max(padded(width) for width in config.d_inner)
        maps = padded(config.dt_rank) + 2 * max(padded(n) for n in config.d_state)
        self._describe_activations(self.record[records.HIDDEN :], config.d_model)
        self._describe_activations(self.record[records.CONVOLVED :], inner)
        self._describe_activations(self.record[records.GATED :], inner)
        for thread in range(threads):
            self._describe_activations(self.step_sizes[thread], config.dt_rank)
        self.record[records.RESIDUAL] = self._floats(rows, padded(config.d_model))
        for address, stride, width in (
            (records.XZ, records.XZ_STRIDE, 2 * inner),
            (records.MAPS, records.MAPS_STRIDE, maps),
            (records.DELTA, records.DELTA_STRIDE, inner),
        ):
            self.record[address], self.record[stride] = self._floats(rows, width), width
        private = padded(TILE_NUMBERS + LANES * max(config.d_state), 64)
        self.record[records.PRIVATE] = self._floats(threads, private)
        self.record[records.PRIVATE_STRIDE] = 4 * private
        self.record[records.MEETING] = self._zeros(BARRIER_NUMBERS, dtype=torch.int64)

    def _describe_activations(self, record: Record, width: int) -> None:
        wide = padded(width, GROUP)
        record[VALUES] = self._floats(self.rows, wide)
        record[BYTES] = self._zeros(self.rows, wide, dtype=torch.int8)
        record[SCALE] = self._floats(self.rows)
        record[START8] = self._zeros(self.rows, dtype=torch.int32)
        record[START4] = self._zeros(self.rows, wide // GROUP, dtype=torch.int32)
        record[WIDTH] = wide

    def _floats(self, *shape: int) -> int:
        return self._zeros(*shape, dtype=torch.float32)

    def _zeros(self, *shape: int, dtype: torch.dtype) -> int:
        tensor = torch.zeros(*shape, dtype=dtype, device="cpu")
        self._kept.append(tensor)
        return tensor.data_ptr()


def _floats(*shape: int) -> Tensor:
    """Memory for the kernel to fill, whatever torch's defaults are."""
    return torch.empty(*shape, dtype=torch.float32, device="cpu")
