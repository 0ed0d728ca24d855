"""Artifacts with an ONNX graph, written without the proofs of an export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

import yunmin
from export.onnx_graph.emit import GraphOptions, write_graph
from tests.models import random_tensors
from yunmin.artifact import write_manifest
from yunmin.checkpoint import Checkpoint, load_checkpoint, write_checkpoint
from yunmin.config import MambaConfig
from yunmin.cost import cost_of
from yunmin.runtime.onnx_contract import GRAPH_FILE, GRAPH_FOLDER
from yunmin.runtime.onnx_runtime import OnnxRuntime
from yunmin.tokenizer import Tokenizer


def write_onnx_artifact(
    folder: Path,
    config: MambaConfig,
    options: GraphOptions | None = GraphOptions(),  # noqa: B008 (frozen)
    *,
    tensors: Mapping[str, Tensor] | None = None,
    tokenizer: Tokenizer | None = None,
) -> Path:
    """Writes a float32 artifact of random weights with a graph of them; without a graph where `options` is None."""
    folder.mkdir(parents=True)
    write_checkpoint(folder, config, random_tensors(config) if tensors is None else tensors)
    if tokenizer is not None:
        tokenizer.save(folder)
    if options is not None:
        (folder / GRAPH_FOLDER).mkdir()
        write_graph(folder / GRAPH_FOLDER / GRAPH_FILE, load_checkpoint(folder), options)
    record(folder, config)
    return folder


def record(folder: Path, config: MambaConfig) -> None:
    """Writes the manifest of a folder as it is."""
    cost, stored = cost_of(config), load_checkpoint(folder, quantized=True).quantization.format
    write_manifest(folder, provenance={}, before=cost, after=cost, cuts=[], parity={}, quantization=stored)


def onnx_runtime_of(folder: Path) -> OnnxRuntime:
    runtime = yunmin.load(folder, device="cpu", runtime="onnx").runtime
    assert isinstance(runtime, OnnxRuntime)
    return runtime


def checkpoint_of(folder: Path) -> Checkpoint:
    return load_checkpoint(folder, quantized=True)
