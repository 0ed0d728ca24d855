"""The ONNX graph of an artifact: written into its folder, proven there, and described for the manifest."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from export.options import Options
from export.verify import Probe
from yunmin.artifact import Parity
from yunmin.checkpoint import load_checkpoint
from yunmin.errors import MissingExtraError
from yunmin.memory import trim_heap
from yunmin.quantization.layout import Format
from yunmin.runtime.onnx_contract import GRAPH_FILE, GRAPH_FOLDER


def require_onnx(purpose: str) -> None:
    """Raises MissingExtraError where a package is missing that graphs are written or verified with."""
    for package in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "onnx", purpose)


def add_graph(
    folder: Path, stored: Format, options: Options, probe: Probe, report: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, Parity]]:
    """Writes `onnx/model.onnx` into an artifact's folder and proves it.

    Args:
        folder: of the artifact, not yet under its final name.
        stored: how its weights are stored.
        options: say which graph.
        probe: what to compare on.
        report: called with the name of each stage as it begins.

    Returns:
        Facts for the manifest, and how far the graph's logits lie from those of its weights.

    Raises:
        VerificationError: the graph does not compute what its weights stand for.
        ConfigError, CheckpointError: the weights cannot be written in the precision.
    """
    from export.onnx_graph.emit import GraphOptions, write_graph
    from export.onnx_graph.verify import describe_graph, verify_graph

    wanted = GraphOptions(options.onnx_flavour or "ort", options.graph_precision(stored))
    path = folder / GRAPH_FOLDER / GRAPH_FILE
    path.parent.mkdir()
    trim_heap()
    report(f"writing the ONNX graph ({wanted.flavour}, {wanted.precision})")
    write_graph(path, load_checkpoint(folder, quantized=True), wanted)
    trim_heap()
    report(f"verifying the ONNX graph on {probe.tokens} tokens")
    proof = verify_graph(path, folder, wanted, probe)
    return describe_graph(path, wanted, proof.change), proof.parity
