"""A graph in onnxruntime, which reads the sequences that it is proven on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, InvalidGraph, RuntimeException
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NotImplementedByRuntime
from torch import Tensor

from yunmin.config import MambaConfig
from yunmin.errors import VerificationError
from yunmin.runtime.onnx_contract import EMBEDDED, INPUT_IDS, KEPT_LOGITS, LOGITS, SESSION_CONFIG, States, state_tensors
from yunmin.threads import get_threads

_REFUSALS = (Fail, InvalidArgument, InvalidGraph, NotImplementedByRuntime, RuntimeException)
_IDS_AT_ONCE = 4096

Arrays = dict[str, npt.NDArray[Any]]


def embedded_rows(path: Path, config: MambaConfig) -> Tensor:
    """What a graph makes of every id of the vocabulary (V, d).

    Raises:
        VerificationError: onnxruntime refuses it.
    """
    model = onnx.load(str(path), load_external_data=False)
    graph, needed, nodes = model.graph, {EMBEDDED}, []
    for node in reversed(graph.node):
        if needed & set(node.output):
            nodes.append(node)
            needed |= set(node.input)
    made = onnx.helper.make_graph(
        nodes[::-1],
        "embedding",
        [value for value in graph.input if value.name in needed],
        [onnx.helper.make_tensor_value_info(EMBEDDED, onnx.TensorProto.FLOAT, ["batch", "sequence", config.d_model])],
        [tensor for tensor in graph.initializer if tensor.name in needed],
    )
    model.graph.CopyFrom(made)
    session = _opened(path, model)
    rows = np.empty((config.vocab_size, config.d_model), np.float32)
    for first in range(0, config.vocab_size, _IDS_AT_ONCE):
        part = rows[first : first + _IDS_AT_ONCE]
        part[:] = session.run([EMBEDDED], {INPUT_IDS: np.arange(first, first + len(part))[None]})[0][0]
    return torch.from_numpy(rows)


def _opened(path: Path, graph: onnx.ModelProto | None) -> onnxruntime.InferenceSession:
    """Of `graph`, whose weights lie beside `path`, or of what is there."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = get_threads()
    options.enable_cpu_mem_arena = False  # memory goes back at once
    for key, value in SESSION_CONFIG.items():
        options.add_session_config_entry(key, value)
    if graph is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    source = str(path) if graph is None else graph.SerializeToString()
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except _REFUSALS as error:
        reason = f"onnx: onnxruntime refuses the graph: {first_line(error)}; nothing was written"
        raise VerificationError(reason) from None


class ProbeSession:
    """A session on the CPU.

    Args:
        path: of the graph.
        config: of the model.
        states: how the graph has them.
        exact: the graph to open in place of what is at `path`, beside which its weights lie: with activations as they
            are. None opens what is there.

    Attributes:
        is_exact: whether activations are left as they are.

    Raises:
        VerificationError: onnxruntime refuses the graph, now or when it runs.
    """

    def __init__(self, path: Path, config: MambaConfig, states: States, exact: onnx.ModelProto | None = None) -> None:
        self.is_exact = exact is not None
        self._tensors = state_tensors(config, states)
        self._session = _opened(path, exact)

    def read(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Logits of each sequence read alone (tokens, V)."""
        return torch.cat([self._run([row], self._zeros(1), 0)[0][0] for row in sequences])

    def step(self, rows: Sequence[Sequence[int]], steps: int, last: int) -> Tensor:
        """The last positions' logits (rows * (1 + steps + last), V).

        Each row is prefilled alone; all then advance together, by single steps, and at the end by several tokens at
        once.
        """
        after = steps + last
        begun = [self._run([row[:-after]], self._zeros(1)) for row in rows]
        states = {name: np.concatenate([state[name] for _, state in begun]) for name in begun[0][1]}
        logits = [torch.cat([first for first, _ in begun])]  # (rows, 1, V)
        for position in range(-after, -last):
            found, states = self._run([row[position : position + 1] for row in rows], states)
            logits.append(found)
        found, _ = self._run([row[-last:] for row in rows], states, 0)
        return torch.cat([*logits, found], dim=1).flatten(0, 1)

    def _zeros(self, batch: int) -> Arrays:
        return {tensor.past: np.zeros((batch, *tensor.shape), np.float32) for tensor in self._tensors}

    def _run(self, ids: npt.ArrayLike, states: Arrays, kept: int | None = None) -> tuple[Tensor, Arrays]:
        """Ids (B, T) and states -> logits (B, kept, V) of the last `kept` positions, 0 for all, and the next states."""
        feeds = {INPUT_IDS: np.asarray(ids, np.int64), **states}
        if kept is not None:
            feeds[KEPT_LOGITS] = np.asarray(kept, np.int64)
        try:
            logits, *present = self._session.run([LOGITS, *(tensor.present for tensor in self._tensors)], feeds)
        except _REFUSALS as error:
            reason = f"onnx: onnxruntime cannot run the graph: {first_line(error)}; nothing was written"
            raise VerificationError(reason) from None
        return torch.from_numpy(logits), dict(zip((tensor.past for tensor in self._tensors), present, strict=True))


def first_line(error: Exception) -> str:
    """Of what an error says."""
    return str(error).strip().splitlines()[0]
