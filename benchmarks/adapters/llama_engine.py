"""llama.cpp through the low-level interface of llama-cpp-python: real batches of sequences, no sampling in between."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp

from benchmarks.adapters.contract import Setup

_BATCH = 2048  # tokens a call may bring
_MICRO_BATCH = 512  # tokens it computes at once, its default
_CONTEXT = 65536  # a Mamba keeps no context, but positions are checked against it
_SILENT = llama_cpp.llama_log_callback(lambda *_: None)  # lives as long as the library, which holds a pointer to it


class LlamaEngine:
    """See `Engine`."""

    can_continue = True

    def __init__(self, setup: Setup) -> None:
        self.path = setup.model
        self.threads = setup.threads
        self.micro_batch = int(setup.options.get("micro_batch", _MICRO_BATCH))
        self.versions = {"llama-cpp-python": llama_cpp.__version__, "build": _build()}
        llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._context: Any = None

    def load(self) -> None:
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model: Any = llama_cpp.llama_model_load_from_file(self.path.encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {self.path}")
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)

    def start(self, batch_size: int) -> None:
        """A context has a fixed number of sequences, so another number gets another context."""
        if self._context is not None and self._batch_size == batch_size:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        else:
            self._new_context(batch_size)
        self._position = 0

    def read(self, token_ids: Sequence[int]) -> None:
        for begin in range(0, len(token_ids), _BATCH):
            piece = token_ids[begin : begin + _BATCH]
            for index, token_id in enumerate(piece):
                self._put(index, token_id, self._position + index, 0, wanted=index == len(piece) - 1)
            self._decode(len(piece))
            self._position += len(piece)

    def step(self, token_ids: Sequence[int]) -> None:
        for index, token_id in enumerate(token_ids):
            self._put(index, token_id, self._position, index, wanted=True)
        self._decode(len(token_ids))
        self._position += 1

    def logits(self) -> list[float]:
        row = llama_cpp.llama_get_logits_ith(self._context, self._first_row)
        return list(row[: self._vocab_size])

    def _new_context(self, batch_size: int) -> None:
        if self._context is not None:
            llama_cpp.llama_free(self._context)
            llama_cpp.llama_batch_free(self._batch)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = _CONTEXT
        params.n_batch = _BATCH
        params.n_ubatch = self.micro_batch
        params.n_seq_max = batch_size
        params.n_threads = params.n_threads_batch = self.threads
        params.no_perf = True
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context of {batch_size} sequences")
        self._batch: Any = llama_cpp.llama_batch_init(_BATCH, 0, 1)
        self._batch_size = batch_size

    def _put(self, index: int, token_id: int, position: int, sequence: int, *, wanted: bool) -> None:
        batch = self._batch
        batch.token[index] = token_id
        batch.pos[index] = position
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = sequence
        batch.logits[index] = wanted

    def _decode(self, count: int) -> None:
        self._batch.n_tokens = count
        status = llama_cpp.llama_decode(self._context, self._batch)
        if status != 0:
            raise RuntimeError(f"llama_decode of {count} tokens returned {status}")
        llama_cpp.llama_synchronize(self._context)
        self._first_row = next(index for index in range(count) if self._batch.logits[index])


def _build() -> str:
    """The instruction sets it was built for."""
    info: str = llama_cpp.llama_print_system_info().decode()
    return " ".join(part.split("=")[0].strip() for part in info.removeprefix("CPU :").split("|") if "= 1" in part)
