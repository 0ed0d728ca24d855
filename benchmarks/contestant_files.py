"""The files that contestants read, made once from one and the same model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import cast

from benchmarks.adapters.remote import Failed, Remote
from yunmin.artifact import is_artifact, read_manifest, write_manifest
from yunmin.checkpoint import Checkpoint, load_checkpoint, write_checkpoint
from yunmin.config import MambaConfig
from yunmin.cost import cost_of
from yunmin.errors import ArtifactError
from yunmin.files import atomic_folder
from yunmin.quantization.layout import FLOAT32, Quantization
from yunmin.quantization.packing import pack_tensors
from yunmin.quantization.rounding import round_tensors
from yunmin.runtime import onnx_contract
from yunmin.runtime.onnx_contract import GRAPH_FILE, GRAPH_FOLDER, Precision
from yunmin.tokenizer import copy_tokenizer

_PREPARE_LIMIT_S = 1800.0

Say = Callable[[str], None]


class Absent(Exception):  # noqa: N818 (not an error: the report names it)
    """A contestant cannot take part; the message says why."""


def our_folder(kind: str, plain: Checkpoint, cache: Path, say: Say) -> tuple[Path, MambaConfig, Quantization]:
    """A folder that `yunmin.load` reads, its config, and how its weights are stored; made by rounding to nearest."""
    if "=" in kind:
        folder = Path(kind.partition("=")[2])
        own = load_checkpoint(folder, quantized=True)
        if (own.config.n_tokens, own.config.vocab_size) != (plain.config.n_tokens, plain.config.vocab_size):
            raise Absent(f"{folder}: its vocabulary of {own.config.n_tokens} ids is not that of the compared model")
        return folder, own.config, own.quantization
    if kind == "fp32":
        return plain.folder, plain.config, FLOAT32
    quantized, folder = _quantization(kind), cache / kind
    if not is_artifact(folder):
        say(f"making {folder}")
        _write_artifact(folder, plain, quantized, {})
    return folder, plain.config, quantized


def graph_artifact(kind: str, plain: Checkpoint, cache: Path, say: Say) -> tuple[Path, Quantization]:
    """An artifact with the graph that yunmin exports, made anew where the code that writes graphs has changed."""
    from export.onnx_graph import stage

    stage.require_onnx("the contestant onnxruntime")
    quantized, folder = _quantization(kind), cache / f"onnx-{kind}"
    code = _digest([*Path(stage.__file__).parent.glob("*.py"), Path(onnx_contract.__file__)])
    if not is_artifact(folder) or _graph_code(folder) != code:
        say(f"making {folder}")
        _write_artifact(folder, plain, quantized, {"graph_code": code}, graph=kind)
    return folder, quantized


def _quantization(kind: str) -> Quantization:
    return FLOAT32 if kind == "fp32" else Quantization("int8" if kind == "int8" else "int4")


def _write_artifact(
    folder: Path, plain: Checkpoint, quantized: Quantization, provenance: dict[str, str], *, graph: str = ""
) -> None:
    """Writes an artifact, rounded to nearest where quantized; `graph` is the precision of its graph, "" for none."""
    tensors, cost = plain.tensors, cost_of(plain.config)
    if quantized.format != "none":
        tensors = pack_tensors(plain.config, tensors, round_tensors(tensors, quantized), quantized)
    with atomic_folder(folder, replace=True) as aside:
        write_checkpoint(aside, plain.config, tensors, quantized)
        copy_tokenizer(plain.folder, aside)
        if graph:
            from export.onnx_graph.emit import GraphOptions, write_graph

            path = aside / GRAPH_FOLDER / GRAPH_FILE
            path.parent.mkdir()
            options = GraphOptions(precision=cast("Precision", graph))
            write_graph(path, replace(plain, tensors=tensors, quantization=quantized), options)
        write_manifest(
            aside,
            provenance={"source": str(plain.folder), "made_by": "benchmarks.compare, rounding to nearest"} | provenance,
            before=cost,
            after=cost,
            cuts=[],
            parity={},
            quantization=quantized.format,
        )


def _graph_code(folder: Path) -> str:
    """Of the code that wrote an artifact's graph; "" for what is no artifact of today's format."""
    try:
        return str(read_manifest(folder, verify_files=False).provenance["graph_code"])
    except (ArtifactError, KeyError):
        return ""


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def gguf_file(kind: str, plain: Checkpoint, cache: Path, say: Say) -> Path:
    from export.gguf import write_gguf

    path = cache / f"{kind}.gguf"
    if not path.is_file():
        say(f"making {path}")
        write_gguf(path, plain.config, plain.tensors, kind=kind)
    return path


def openvino_folder(plain: Checkpoint, cache: Path, python: str, say: Say) -> Path:
    """Its own exporter makes it, under its own interpreter."""
    folder = cache / "openvino"
    if not (folder / "openvino_model.xml").is_file():
        say(f"making {folder}, which takes a minute")
        spec = {"kind": "openvino", "prepare": [str(plain.folder.absolute()), str(folder.absolute())]}
        remote = None
        try:
            remote = Remote("adapters.server", spec, python=python, threads=1)
            remote.read(_PREPARE_LIMIT_S)
        except Failed as reason:
            raise Absent(str(reason)) from None
        finally:
            if remote is not None:
                remote.close()
    return folder
