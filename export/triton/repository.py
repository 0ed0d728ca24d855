"""Writing a model repository: a model that streams text, and the graph with its state kept by the server."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from export.onnx_graph.stage import require_onnx
from export.triton.config_pbtxt import onnx_config, text_config
from export.verify import make_probe
from yunmin.artifact import load_artifact
from yunmin.checkpoint import Checkpoint
from yunmin.config import MambaConfig
from yunmin.errors import ArtifactError, ConfigError, StateError
from yunmin.files import atomic_folder
from yunmin.language_model import load
from yunmin.runtime.onnx_contract import GRAPH_FILE, GRAPH_FOLDER, GraphFacts, Precision, state_tensors
from yunmin.runtime.onnx_state import graph_tensors
from yunmin.snapshots import read_state_file, snapshot_metadata
from yunmin.state import MambaState
from yunmin.triton_contract import ARTIFACT_FOLDER, INITIAL_STATES

ONNX_SUFFIX = "_onnx"
SLOTS = 8
MAX_SEQUENCES = 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_MODEL_PY = '''"""Run by Triton's python backend, in whose environment yunmin must be installed."""

from serving.triton.python_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def named_states(files: Sequence[str]) -> dict[str, Path]:
    """Files of saved states by the names they have without their folder and suffix.

    Raises:
        ConfigError: two have the same name.
        StateError: there is no such file, or it is none of a saved state.
    """
    states: dict[str, Path] = {}
    for path in map(Path, files):
        if not path.is_file():
            raise StateError(f"{path}: expected a file of `yunmin state build`, found none")
        if path.stem in states:
            raise ConfigError(f"{path}: expected another name than that of {states[path.stem]}, which names a model")
        states[path.stem] = path
    for path in states.values():
        snapshot_metadata(path, read_state_file(path))
    return states


def check_repository(
    repo: Path, artifact: Path, *, name: str = "mamba", states: Sequence[str] = (), force: bool = False
) -> None:
    """Looks before any work whether a repository may be written there.

    Raises:
        ConfigError: a name cannot be a model's, or the repository and the artifact lie in one another.
        ArtifactError: something is there and `force` is off, or it is no repository of these models, which `force`
            never replaces.
    """
    inner, outer = repo.resolve(), artifact.resolve()
    if inner == outer or inner in outer.parents or outer in inner.parents:
        raise ConfigError(f"{repo}: expected a folder apart from the artifact's, {artifact}")
    for parent in inner.parents:
        if parent.exists() and not parent.is_dir():
            raise ArtifactError(f"{repo}: cannot be created, {parent} is a file")
    for given in (name, *states):
        if not _NAME.fullmatch(given):
            raise ConfigError(f"Triton model name {given!r}: expected up to 64 letters, digits, '_', '-' and '.'")
    if repo.is_symlink() or (repo.exists() and not repo.is_dir()):
        raise ArtifactError(f"{repo}: expected a folder to write, found a file or a link")
    if not repo.exists() or not (found := sorted(path.name for path in repo.iterdir())):
        return
    if not force:
        raise ArtifactError(f"{repo}: exists already; --force replaces a repository")
    ours = {name, name + ONNX_SUFFIX}
    strange = [entry for entry in found if entry not in ours and not entry.startswith(f"{name}{ONNX_SUFFIX}_")]
    if strange or not (repo / name / "1" / ARTIFACT_FOLDER).is_dir():
        what = f"{strange[0]!r}" if strange else f"no model {name!r} of ours"
        raise ArtifactError(f"{repo}: holds {what}; --force replaces only a repository written by this command")


def write_repository(
    repo: Path,
    artifact: Path,
    *,
    name: str = "mamba",
    initial_states: Mapping[str, Path] | None = None,
    force: bool = False,
) -> None:
    """Writes a repository of two models, and of one more for each saved state; whole or not at all.

    `NAME` streams text and holds a copy of the artifact. `NAME_onnx` is the graph with stacked states, proven, in the
    precision of the artifact's own graph where it has one, else that of its weights; the server keeps the states
    of its sequences, which begin at zero. `NAME_onnx_STATE` is the same graph, whose sequences go on from a saved
    state.

    Args:
        repo: folder to write.
        artifact: a finished artifact folder.
        name: of the models.
        initial_states: files of `yunmin state build`, by name.
        force: whether a repository of these models that is there gives way.

    Raises:
        ArtifactError: the artifact is damaged, or the repository cannot be written.
        ConfigError: a name cannot be a model's, or the repository and the artifact lie in one another.
        StateError: a saved state is damaged or another model's.
        VerificationError: the graph does not compute what the weights stand for.
        MissingExtraError: onnx or onnxruntime is not installed.
    """
    states = dict(initial_states or {})
    check_repository(repo, artifact, name=name, states=tuple(states), force=force)
    checkpoint, _ = load_artifact(artifact)
    model = load(artifact, device="cpu", runtime="torch") if states else None  # has the fingerprint of its states
    snapshots = {} if model is None else {key: model.load_state(path) for key, path in states.items()}
    precision = _graph_precision(artifact, checkpoint)
    graph_name = name + ONNX_SUFFIX
    try:
        with atomic_folder(repo, replace=force) as folder:
            _write_text_model(folder / name, name, artifact)
            graph = folder / graph_name / "1" / GRAPH_FILE
            graph.parent.mkdir(parents=True)
            _write_graph(graph, checkpoint, precision, artifact)
            _write_config(folder / graph_name, onnx_config(graph_name, checkpoint.config, max_sequences=MAX_SEQUENCES))
            for key, snapshot in snapshots.items():
                own = folder / f"{graph_name}_{key}"
                _link_folder(graph.parent, own / "1")
                _write_state_model(own, checkpoint.config, snapshot.state)
    except OSError as error:
        raise ArtifactError(f"{repo}: cannot be written: {error.strerror or error}") from None


def stack(state: MambaState) -> tuple[Tensor, Tensor]:
    """States as a graph with stacked states takes them: those of the convolutions, and those of the scans."""
    tensors = [tensor.float().flatten(1) for tensor in graph_tensors(state)]  # of each layer both
    return torch.cat(tensors[0::2], dim=1), torch.cat(tensors[1::2], dim=1)


def _write_text_model(folder: Path, name: str, artifact: Path) -> None:
    version = folder / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(_MODEL_PY, encoding="utf-8")
    shutil.copytree(artifact, version / ARTIFACT_FOLDER)
    _write_config(folder, text_config(name, {"slots": str(SLOTS), "runtime": "auto"}))


def _write_state_model(folder: Path, config: MambaConfig, state: MambaState) -> None:
    """What a model with an initial state has beside its graph."""
    files = {}
    (folder / INITIAL_STATES).mkdir()
    for kind, values in zip(state_tensors(config, "stacked"), stack(state), strict=True):
        files[kind.past] = f"{kind.past}.bin"
        (folder / INITIAL_STATES / files[kind.past]).write_bytes(values.contiguous().numpy().astype("<f4").tobytes())
    text = onnx_config(folder.name, config, max_sequences=MAX_SEQUENCES, initial_files=files)
    _write_config(folder, text)


def _write_config(folder: Path, text: str) -> None:
    (folder / "config.pbtxt").write_text(text, encoding="utf-8")


def _write_graph(path: Path, checkpoint: Checkpoint, precision: Precision, artifact: Path) -> None:
    """Writes the graph with stacked states, and proves it as that of an artifact is proven."""
    from export.onnx_graph.emit import GraphOptions, write_graph
    from export.onnx_graph.verify import verify_graph

    # what runs it is ONNX Runtime, whose own operators say how activations are rounded
    options = GraphOptions("ort", precision, "stacked")
    write_graph(path, checkpoint, options)
    verify_graph(path, artifact, options, make_probe(checkpoint.tokenizer, checkpoint.config.n_tokens))


def _graph_precision(artifact: Path, checkpoint: Checkpoint) -> Precision:
    """That of the artifact's graph; where it has none, the one that its weights ask for."""
    require_onnx("a Triton repository")
    import onnx

    path = artifact / GRAPH_FOLDER / GRAPH_FILE
    if not path.is_file():
        stored = checkpoint.quantization.format
        return "fp32" if stored == "none" else stored
    model = onnx.load(path, load_external_data=False)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    return GraphFacts.from_metadata(properties, where=str(path)).precision


def _link_folder(source: Path, target: Path) -> None:
    """The same files once more: links where the file system has them, so that large graphs are stored once."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        try:
            os.link(path, target / path.name)
        except OSError:
            shutil.copy2(path, target / path.name)
