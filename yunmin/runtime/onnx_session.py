"""An artifact's ONNX graph, and a session of ONNX Runtime that computes it from and into memory of ours."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from yunmin.artifact import Manifest
from yunmin.errors import ArtifactError, ConfigError, MissingExtraError
from yunmin.files import sha256_file
from yunmin.runtime.onnx_contract import (
    GRAPH_FILE,
    GRAPH_FOLDER,
    INPUT_IDS,
    KEPT_LOGITS,
    LOGITS,
    SESSION_CONFIG,
    GraphFacts,
    state_tensors,
)
from yunmin.runtime.onnx_state import StateMemory

try:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
except ModuleNotFoundError as missing:
    raise MissingExtraError(str(missing.name), "onnx", "the onnx runtime") from None

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_REFUSALS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.ModelLoadCanceled,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)
_Argument = tuple[str, list[int | None]]  # type and shape, as onnxruntime names them; None for any number
_MOST_BINDINGS = 64  # of one memory: each knows two places of every tensor


@dataclass(frozen=True)
class GraphFile:
    """A graph as a manifest vouches for it.

    Attributes:
        path: of `model.onnx`.
        sha256: of each of its files, by name.
        nbytes: of all of them: the weights and, beside them, little.
    """

    path: Path
    sha256: dict[str, str]
    nbytes: int

    @classmethod
    def of_artifact(cls, folder: Path, manifest: Manifest) -> GraphFile:
        """The graph of an artifact whose files have been compared with its manifest.

        Raises:
            ConfigError: the artifact has none.
            ArtifactError: it has a file of weights that the manifest does not know.
        """
        names = {name: f"{GRAPH_FOLDER}/{name}" for name in (GRAPH_FILE, f"{GRAPH_FILE}.data")}
        records = {name: manifest.files[path] for name, path in names.items() if path in manifest.files}
        if GRAPH_FILE not in records:
            raise ConfigError(f"{folder}: expected {names[GRAPH_FILE]} for the onnx runtime, found none; "
                              "export the artifact with --onnx")  # fmt: skip
        for name, path in names.items():
            if name not in records and (folder / path).exists():
                raise ArtifactError(f"{folder}: expected a record of {path} in the manifest, found none")
        sha256 = {name: record.sha256 for name, record in records.items()}
        return cls(folder / names[GRAPH_FILE], sha256, sum(record.bytes for record in records.values()))

    def require_unchanged(self) -> None:
        """Raises ArtifactError where a file is not, or no longer, what the manifest says; names it."""
        for name, expected in self.sha256.items():
            file = self.path.with_name(name)
            if not file.is_file() or sha256_file(file) != expected:
                raise ArtifactError(f"{file}: wrong hash: expected sha256 {expected[:12]}…, the file has changed")


class Binding:
    """Where a session reads and writes the states of a number of rows; ids and logits are given with each run.

    Args:
        session: of the graph.
        batch: first rows of both memories.
        read: memory and side that holds the states.
        write: memory and side for the next states; another one.
        kept: positions from the end to compute logits of, 0 for all.
    """

    def __init__(
        self,
        session: GraphSession,
        batch: int,
        read: tuple[StateMemory, int],
        write: tuple[StateMemory, int],
        kept: int = 1,
    ) -> None:
        self._ort = session.ort
        self._cuda = session.device if session.device.type == "cuda" else None
        self._device = (session.device.type, session.device.index or 0)
        self._io = session.ort.io_binding()
        for bind, names, (memory, side) in (
            (self._io.bind_input, [state.past for state in session.states], read),
            (self._io.bind_output, [state.present for state in session.states], write),
        ):
            address = memory.side(side).data_ptr()
            for name, begin, shape in zip(names, memory.begins, memory.layout.shapes, strict=True):
                place = address + begin * torch.float32.itemsize
                bind(name, *self._device, np.float32, (batch, *shape), place)
        if kept != 1:
            value = onnxruntime.OrtValue.ortvalue_from_numpy(np.asarray(kept, np.int64))
            self._io.bind_ortvalue_input(KEPT_LOGITS, value)

    def run(self, ids: Tensor, logits: Tensor) -> None:
        """Computes; the session is nobody else's meanwhile.

        Args:
            ids: int64 (B, T), contiguous, on the session's device.
            logits: float32 (B, kept, V) likewise; written.
        """
        self._io.bind_input(INPUT_IDS, *self._device, np.int64, tuple(ids.shape), ids.data_ptr())
        self._io.bind_output(LOGITS, *self._device, np.float32, tuple(logits.shape), logits.data_ptr())
        if self._cuda is not None:  # torch's stream and the session's know nothing of each other
            torch.cuda.current_stream(self._cuda).synchronize()
        self._ort.run_with_iobinding(self._io)
        if self._cuda is not None:
            self._io.synchronize_outputs()


class GraphSession:
    """A graph in ONNX Runtime.

    Args:
        graph: to open.
        device: a CPU or CUDA.
        threads: that a product of matrices is divided among, on a CPU.

    Attributes:
        ort: the library's own object.
        device, threads: as above.
        facts: what the graph says about itself.
        states: its inputs and outputs for them, in the order of `yunmin.runtime.onnx_state.Layout`.

    Raises:
        ArtifactError: the graph is damaged or not one of ours.
        ConfigError: its states are stacked, or this onnxruntime cannot compute it or has nothing for the device.
    """

    def __init__(self, graph: GraphFile, device: torch.device, threads: int) -> None:
        self.device, self.threads = device, threads
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        for key, value in SESSION_CONFIG.items():
            options.add_session_config_entry(key, value)
        try:
            self.ort = onnxruntime.InferenceSession(str(graph.path), options, providers=_providers(device))
        except _REFUSALS as error:
            reason = str(error).strip().splitlines()[0]
            raise ArtifactError(f"{graph.path}: onnxruntime {onnxruntime.__version__} refuses it: {reason}") from None
        self.facts = GraphFacts.from_metadata(self.ort.get_modelmeta().custom_metadata_map, where=str(graph.path))
        if self.facts.states != "layers":
            raise ConfigError(
                f"{graph.path}: expected states by layer, found {self.facts.states} ones, which are for Triton; "
                "export the artifact with --onnx"
            )
        if device.type == "cuda" and _CUDA not in self.ort.get_providers():
            raise ConfigError(f"device {str(device)!r}: onnxruntime could not start on it, its log has the reason")
        self.states = state_tensors(self.facts.config, "layers")
        self._require_contract(graph.path)
        self._bindings: WeakKeyDictionary[StateMemory, OrderedDict[tuple[int, int], Binding]] = WeakKeyDictionary()

    def step_binding(self, memory: StateMemory, count: int, side: int) -> Binding:
        """Of a step of the first so many rows that reads one side and writes the other; those last used are kept."""
        kept = self._bindings.setdefault(memory, OrderedDict())
        if (binding := kept.get((count, side))) is None:
            binding = kept[count, side] = Binding(self, count, (memory, side), (memory, 1 - side))
            if len(kept) > _MOST_BINDINGS:
                kept.popitem(last=False)
        else:
            kept.move_to_end((count, side))
        return binding

    def _require_contract(self, where: Path) -> None:
        """Raises ArtifactError where an input or output is missing, or of another type or shape; names it."""
        inputs: dict[str, _Argument] = {INPUT_IDS: ("tensor(int64)", [None, None]), KEPT_LOGITS: ("tensor(int64)", [])}
        outputs: dict[str, _Argument] = {LOGITS: ("tensor(float)", [None, None, self.facts.config.vocab_size])}
        for state in self.states:
            inputs[state.past] = outputs[state.present] = ("tensor(float)", [None, *state.shape])
        for kind, expected, arguments in (
            ("input", inputs, (*self.ort.get_inputs(), *self.ort.get_overridable_initializers())),
            ("output", outputs, self.ort.get_outputs()),
        ):
            found = {a.name: (a.type, [n if isinstance(n, int) else None for n in a.shape]) for a in arguments}
            for name in sorted(expected.keys() | found.keys()):
                wanted, given = expected.get(name), found.get(name)
                if given != wanted:
                    raise ArtifactError(f"{where}: {kind} {name!r}: expected {_shown(wanted)}, found {_shown(given)}")


def usable_device(wanted: str) -> torch.device:
    """The device to compute on; "auto" is CUDA where both torch and onnxruntime have it, else the CPU.

    Raises:
        ConfigError: there is no such device, or onnxruntime has nothing for it.
    """
    has_provider = _CUDA in onnxruntime.get_available_providers()
    if wanted == "auto":
        wanted = "cuda" if has_provider and torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ConfigError(f"device {wanted!r} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type == "cpu":
        return torch.device("cpu")  # there is one, whatever number it is given
    if device.type != "cuda":
        raise ConfigError(f"the onnx runtime runs on a CPU or on CUDA, not on {wanted!r}")
    if not has_provider:
        raise ConfigError(
            f"device {wanted!r}: this onnxruntime has no {_CUDA}; install onnxruntime-gpu in place of onnxruntime"
        )
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {wanted!r} cannot be used: torch finds no such device")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def _shown(argument: _Argument | None) -> str:
    if argument is None:
        return "none"
    return f"{argument[0]} of shape ({', '.join('any' if n is None else str(n) for n in argument[1])})"


def _providers(device: torch.device) -> Sequence[str | tuple[str, dict[str, object]]]:
    if device.type == "cpu":
        return [_CPU]
    return [(_CUDA, {"device_id": device.index}), _CPU]
