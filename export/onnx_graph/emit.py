"""Writes a model as one ONNX graph for any batch and any number of tokens, states going in and out."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

import onnx
from onnx import TensorProto, ValueInfoProto, helper

from export.onnx_graph.builder import MICROSOFT, GraphBuilder
from export.onnx_graph.external import write_model
from export.onnx_graph.layer import LayerWriter
from export.onnx_graph.matrices import Matrices
from export.onnx_graph.weights import GraphWeights
from yunmin.checkpoint import Checkpoint
from yunmin.runtime.onnx_contract import (
    EMBEDDED,
    INPUT_IDS,
    KEPT_LOGITS,
    LOGITS,
    Flavour,
    GraphFacts,
    Precision,
    States,
    StateTensor,
    state_tensors,
)

OPSET = 21
_IR_VERSION = 10
EMBEDDING = "backbone.embeddings.weight"


@dataclass(frozen=True)
class GraphOptions:
    """What kind of graph is wanted.

    Attributes:
        flavour: "ort" uses the fused operators of ONNX Runtime where they are faster, "portable" basic ones only.
        precision: how weights are stored; fp16 and integers are computed with in float32 and int8.
        states: a pair of tensors for each layer, or two for all ("stacked", for Triton).
    """

    flavour: Flavour = "ort"
    precision: Precision = "fp32"
    states: States = "layers"


def write_graph(path: Path, checkpoint: Checkpoint, options: GraphOptions) -> None:
    """Writes a graph; the same input gives the same bytes.

    Args:
        path: of the `.onnx` file; large weights go into a file of the same name with `.data` appended.
        checkpoint: float32, or quantized as stored.
        options: what kind of graph.

    Raises:
        ConfigError: the precision does not go with the checkpoint's.
        CheckpointError: a weight cannot be quantized; names it.
    """
    graph = GraphBuilder()
    config = checkpoint.config
    weights = GraphWeights(checkpoint, options.precision)
    matrices = Matrices(graph, weights, options.flavour, options.precision)
    length = graph.op("Shape", [INPUT_IDS], start=1, end=2)
    is_step = graph.op("Squeeze", [graph.op("Equal", [length, graph.ints(1)])])
    layers = LayerWriter(graph, config, weights, matrices, options.flavour, is_step)

    tensors = state_tensors(config, options.states)
    by_layer = state_tensors(config, "layers")
    if options.states == "stacked":
        _unstack(graph, tensors, by_layer)
    x = graph.op("Identity", [matrices.rows(INPUT_IDS, EMBEDDING)], output=EMBEDDED)  # (B, T, d)
    for layer in range(config.n_layers):
        graph.scope(f"layers.{layer}")
        conv, recurrent = by_layer[2 * layer : 2 * layer + 2]
        x = layers.block(x, layer, conv, recurrent)
    graph.scope("")
    if options.states == "stacked":
        _stack(graph, tensors, by_layer)
    kept = graph.op("Reshape", [graph.op("Neg", [KEPT_LOGITS]), graph.ints(1)])
    x = graph.op("Slice", [x, kept, graph.ints(2**62), graph.ints(1)])  # (B, kept, d)
    x = layers.norm(x, "backbone.norm_f.weight")
    logits = matrices.head(x, EMBEDDING if config.tie_word_embeddings else "lm_head.weight")
    graph.op("Identity", [logits], output=LOGITS)

    ids = helper.make_tensor_value_info(INPUT_IDS, TensorProto.INT64, ["batch", "sequence"])
    keep = helper.make_tensor_value_info(KEPT_LOGITS, TensorProto.INT64, [])
    logits_info = helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ["batch", "kept", config.vocab_size])
    default = helper.make_tensor(KEPT_LOGITS, TensorProto.INT64, [], [1])  # an input with a default value
    proto = helper.make_graph(
        graph.nodes,
        "mamba",
        [ids, keep, *(_value(tensor.past, tensor) for tensor in tensors)],
        [logits_info, *(_value(tensor.present, tensor) for tensor in tensors)],
        [*graph.constants, default],
    )
    opsets = [helper.make_opsetid("", OPSET)]
    if options.flavour == "ort":
        opsets.append(helper.make_opsetid(MICROSOFT, 1))
    model = helper.make_model(proto, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="yunmin")
    facts = GraphFacts(config, options.flavour, options.precision, options.states)
    onnx.helper.set_model_props(model, facts.to_metadata())
    write_model(path, model, graph.weights)


def _value(name: str, tensor: StateTensor) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *tensor.shape])


def _unstack(graph: GraphBuilder, stacks: list[StateTensor], by_layer: list[StateTensor]) -> None:
    for kind, stack in enumerate(stacks):
        layers = by_layer[kind :: len(stacks)]
        sizes = graph.ints(*(prod(tensor.shape) for tensor in layers))
        parts = graph.ops("Split", [stack.past, sizes], len(layers), axis=1)
        for part, tensor in zip(parts, layers, strict=True):
            graph.op("Reshape", [part, graph.ints(-1, *tensor.shape)], output=tensor.past)


def _stack(graph: GraphBuilder, stacks: list[StateTensor], by_layer: list[StateTensor]) -> None:
    for kind, stack in enumerate(stacks):
        flat = [graph.op("Reshape", [tensor.present, graph.ints(0, -1)]) for tensor in by_layer[kind :: len(stacks)]]
        graph.op("Concat", flat, axis=1, output=stack.present)
