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
from yunmin.runtime.onnx_contract import INPUT_IDS, KEPT_LOGITS, LOGITS, States, state_tensors
from yunmin.threads import get_threads

EXACT_ACTIVATIONS = 1  # MatMulNBits' accuracy_level of float32
_REFUSALS = (Fail, InvalidArgument, InvalidGraph, NotImplementedByRuntime, RuntimeException)

Arrays = dict[str, npt.NDArray[Any]]


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
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = get_threads()
        options.enable_cpu_mem_arena = False  # memory goes back at once
        # of DequantizeLinear and MatMul it makes MatMulNBits, which rounds activations unless told not to
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(EXACT_ACTIVATIONS))
        if self.is_exact:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        source = str(path) if exact is None else exact.SerializeToString()
        try:
            self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except _REFUSALS as error:
            reason = f"onnx: onnxruntime refuses the graph: {first_line(error)}; nothing was written"
            raise VerificationError(reason) from None

    def read(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Logits of each sequence read alone (tokens, V)."""
        return torch.cat([self._run([row], self._zeros(1), 0)[0][0] for row in sequences])

    def step(self, rows: Sequence[Sequence[int]], steps: int) -> Tensor:
        """The last positions' logits by a prefill of each row alone and single steps of all (rows * (steps + 1), V)."""
        begun = [self._run([row[:-steps]], self._zeros(1), 1) for row in rows]
        states = {name: np.concatenate([state[name] for _, state in begun]) for name in begun[0][1]}
        logits = [torch.cat([first[:, 0] for first, _ in begun])]  # (rows, V)
        for position in range(-steps, 0):
            found, states = self._run([[row[position]] for row in rows], states, 1)
            logits.append(found[:, 0])
        return torch.stack(logits, dim=1).flatten(0, 1)

    def _zeros(self, batch: int) -> Arrays:
        return {tensor.past: np.zeros((batch, *tensor.shape), np.float32) for tensor in self._tensors}

    def _run(self, ids: npt.ArrayLike, states: Arrays, kept: int) -> tuple[Tensor, Arrays]:
        """Ids (B, T) and states -> logits of the last `kept` positions, 0 for all (B, kept, V), and the next states."""
        feeds = {INPUT_IDS: np.asarray(ids, np.int64), KEPT_LOGITS: np.asarray(kept, np.int64), **states}
        try:
            logits, *present = self._session.run([LOGITS, *(tensor.present for tensor in self._tensors)], feeds)
        except _REFUSALS as error:
            reason = f"onnx: onnxruntime cannot run the graph: {first_line(error)}; nothing was written"
            raise VerificationError(reason) from None
        return torch.from_numpy(logits), dict(zip((tensor.past for tensor in self._tensors), present, strict=True))


def first_line(error: Exception) -> str:
    """Of what an error says."""
    return str(error).strip().splitlines()[0]
