"""Proof that an ONNX graph computes what its weights stand for: in onnxruntime, against plain torch, on real text.

Integers are proven twice. With activations as they are, the graph must give the logits of its dequantized weights to
float32's accuracy: that covers the integers, the scales and every operator. As it is served, its products round
activations to 8 bits, too, and must give the logits of the torch network that rounds the same blocks. A few activations
lie so near the middle of two integers that they go to one here and to the other there; that may change logits by no
more than rounding does at all, and by no more than half the largest.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor

from export.onnx_graph.emit import EMBEDDING, GraphOptions
from export.onnx_graph.probe_session import ProbeSession, embedded_rows, first_line
from export.onnx_graph.reference import reference_network
from export.onnx_graph.weights import GraphWeights, reference_tensor
from export.verify import TOLERANCES, Probe, logits_as_batch, require_parity
from yunmin.artifact import Parity
from yunmin.checkpoint import Checkpoint, load_checkpoint
from yunmin.errors import VerificationError
from yunmin.memory import trim_heap
from yunmin.runtime.onnx_contract import Precision

STEPS = 32
_LAST = 5  # tokens that follow the steps at once
_HISTORIES = (64, 29, 1)  # tokens before the steps, unequal
_EXACT_ACTIVATIONS = 1  # MatMulNBits' accuracy_level of float32
_SERVED = "onnx_int8_activations"
_LARGEST_TOLERANCE = 0.5
_ROWS = 64  # of logits that are compared at once


@dataclass(frozen=True)
class GraphProof:
    """What was found out about a graph.

    Attributes:
        parity: how far it lies from its weights, by claim: "onnx_embedding" (the rows of all ids); of logits, "onnx"
            (whole sequences) and "onnx_steps" with activations as they are, and for products that round them
            "onnx_int8_activations", both.
        change: how far rounding of weights and activations takes its logits from those of the artifact's weights, of
            the largest.
    """

    parity: dict[str, Parity]
    change: float


def verify_graph(path: Path, artifact: Path, options: GraphOptions, probe: Probe) -> GraphProof:
    """Compares a graph with the torch network of its weights: whole sequences, and 32 steps of a batch of three,
    which then reads more tokens at once.

    Args:
        path: of the graph.
        artifact: the folder with the weights that it was written from; read again, so that they need not stay in memory
            beside onnxruntime's.
        options: of the graph.
        probe: what to compare on.

    Raises:
        VerificationError: logits differ by more than the claims allow, or `onnx.checker` or onnxruntime refuses the
            graph.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise VerificationError(
            f"onnx: the checker refuses the graph: {first_line(error)}; nothing was written"
        ) from None
    rows = _rows_to_step(probe)
    both = Probe((*probe.sequences, *rows), probe.origin)
    read, stepped = probe.tokens, _step_positions(probe, rows)
    graph = onnx.load(str(path), load_external_data=False)
    rounds = _with_exact_activations(graph)
    checkpoint = load_checkpoint(artifact, quantized=True)
    config, precision, stored = checkpoint.config, options.precision, checkpoint.quantization.format
    table = reference_tensor(GraphWeights(checkpoint, precision), precision, EMBEDDING)
    parity = {"onnx_embedding": require_parity("onnx_embedding", embedded_rows(path, config), table)}
    del table
    trim_heap()
    expected = _reference_logits(checkpoint, precision, both)
    change = 0.0
    if precision not in ("fp32", stored) and not rounds:
        change = _relative_change(expected, _reference_logits(checkpoint, "fp32", both))
    del checkpoint  # which would stay in memory beside onnxruntime's
    trim_heap()
    session = ProbeSession(path, config, options.states, graph)
    parity |= {
        "onnx": require_parity("onnx", session.read(probe.sequences), expected[:read]),
        "onnx_steps": require_parity("onnx_steps", session.step(rows, STEPS, _LAST), expected[stepped]),
    }
    del session
    trim_heap()
    if rounds:
        checkpoint = load_checkpoint(artifact, quantized=True)
        rounded = _reference_logits(checkpoint, precision, both, rounds_activations=True)
        tolerance = max(TOLERANCES[_SERVED], _relative_change(rounded, expected))
        del expected
        trim_heap()
        change = _relative_change(rounded, _reference_logits(checkpoint, "fp32", both))
        del checkpoint
        trim_heap()
        session = ProbeSession(path, config, options.states)
        served = torch.cat([session.read(probe.sequences), session.step(rows, STEPS, _LAST)])
        rounded = rounded[torch.cat([torch.arange(read), stepped])]
        parity[_SERVED] = require_parity(_SERVED, served, rounded, tolerance=min(tolerance, _LARGEST_TOLERANCE))
    return GraphProof(parity, change)


def _reference_logits(
    checkpoint: Checkpoint, precision: Precision, probe: Probe, *, rounds_activations: bool = False
) -> Tensor:
    """The torch network's logits (tokens, V)."""
    network = reference_network(checkpoint, precision, rounds_activations=rounds_activations)
    return logits_as_batch(network, probe)  # one batch, since weights are made anew for each call


def _relative_change(logits: Tensor, reference: Tensor) -> float:
    """The largest difference, relative to the reference's largest logit."""
    pairs = zip(logits.split(_ROWS), reference.split(_ROWS), strict=True)
    change = max(float((a - b).abs().max()) for a, b in pairs)
    return change / max(float(reference.max()), -float(reference.min()), 1e-30)


def describe_graph(path: Path, options: GraphOptions, change: float) -> dict[str, Any]:
    """Facts about a graph for the manifest."""
    graph = onnx.load(str(path), load_external_data=False)
    functions = Counter(
        f"{node.domain}:{node.op_type}" if node.domain else node.op_type for node in _nodes(graph.graph)
    )
    data = path.with_name(f"{path.name}.data")
    return {
        "file": f"{path.parent.name}/{path.name}",
        "flavour": options.flavour,
        "precision": options.precision,
        "change": change,
        "opset": next(opset.version for opset in graph.opset_import if not opset.domain),
        "bytes": path.stat().st_size + (data.stat().st_size if data.is_file() else 0),
        "operators": dict(sorted(functions.items())),
        "onnxruntime": onnxruntime.__version__,
    }


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes, those of bodies and branches too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g)


def _rows_to_step(probe: Probe) -> tuple[tuple[int, ...], ...]:
    """Token ids for a batch of three with unequal histories, from the probe's text, which is repeated where short."""
    sources = itertools.cycle(probe.sequences)
    return tuple(
        tuple(itertools.islice(itertools.cycle(source), history + STEPS + _LAST))
        for source, history in zip(sources, _HISTORIES, strict=False)
    )


def _step_positions(probe: Probe, rows: Sequence[Sequence[int]]) -> Tensor:
    """Where the stepped logits lie among those of the probe and then the rows, int64, row after row."""
    ends = itertools.accumulate((len(row) for row in rows), initial=probe.tokens)
    next(ends)
    return torch.cat([torch.arange(end - STEPS - _LAST - 1, end) for end in ends])


def _with_exact_activations(graph: onnx.ModelProto) -> bool:
    """Has products of integers leave activations as they are, in place; whether there are any that would not."""
    levels = [
        attribute
        for node in graph.graph.node
        if node.op_type == "MatMulNBits"
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    ]
    for attribute in levels:
        attribute.i = _EXACT_ACTIVATIONS
    return bool(levels)
