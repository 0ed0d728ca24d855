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
from yunmin.runtime.onnx_contract import INPUT_IDS, KEPT_LOGITS, LOGITS, SESSION_CONFIG, States, state_tensors
from yunmin.threads import get_threads

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
        for key, value in SESSION_CONFIG.items():
            options.add_session_config_entry(key, value)
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
