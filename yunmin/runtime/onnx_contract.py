"""What an ONNX graph of ours looks like from outside: its inputs, outputs and metadata; `export.onnx_graph` writes it.

Names follow ONNX Runtime GenAI's for models with recurrent states. For layers 0..n-1, with B >= 1 sequences of T >= 1
tokens each:

    input_ids                                 int64 (B, T)
    num_logits_to_keep                        int64 (), optional: logits of the last so many positions, 0 for all (1)
    past_key_values.{i}.conv_state            float32 (B, K-1, D)
    past_key_values.{i}.recurrent_state       float32 (B, N, D)
    logits                                    float32 (B, kept, V)
    present.{i}.conv_state, present.{i}.recurrent_state    as the inputs

A graph with stacked states has two tensors instead, all layers of a sequence behind one another, each as above and
flattened: `past_conv_states` (B, sum of (K-1) * D) and `past_recurrent_states` (B, sum of N * D), and `present_...`.
Inputs and outputs sort alike by name, since Triton pairs implicit states that way (server#8586).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, get_args

from yunmin.config import MambaConfig
from yunmin.errors import ArtifactError, ConfigError

Flavour = Literal["ort", "portable"]
Precision = Literal["fp32", "fp16", "int8", "int4"]
States = Literal["layers", "stacked"]

GRAPH_FOLDER = "onnx"
GRAPH_FILE = "model.onnx"
INPUT_IDS = "input_ids"
KEPT_LOGITS = "num_logits_to_keep"
LOGITS = "logits"
EMBEDDED = "embedded"  # the value that is made of ids alone
FORMAT_VERSION = 2
# ONNX Runtime makes products of DequantizeLinear and MatMul that round activations, unless told not to
SESSION_CONFIG = {"session.qdq_matmulnbits_accuracy_level": "1"}
_PREFIX = "yunmin."


@dataclass(frozen=True)
class StateTensor:
    """A state that goes into a graph and comes out of it.

    Attributes:
        past, present: names of the input and of the output.
        shape: without the batch.
    """

    past: str
    present: str
    shape: tuple[int, ...]


def state_tensors(config: MambaConfig, states: States) -> list[StateTensor]:
    """The states of a model's graph, in its order."""
    shapes = {
        "conv": [(config.d_conv - 1, inner) for inner in config.d_inner],
        "recurrent": [(n, inner) for n, inner in zip(config.d_state, config.d_inner, strict=True)],
    }
    if states == "stacked":
        return [
            StateTensor(f"past_{kind}_states", f"present_{kind}_states", (sum(map(prod, shapes[kind])),))
            for kind in shapes
        ]
    return [
        StateTensor(f"past_key_values.{layer}.{kind}_state", f"present.{layer}.{kind}_state", shapes[kind][layer])
        for layer in range(config.n_layers)
        for kind in shapes
    ]


@dataclass(frozen=True)
class GraphFacts:
    """What a graph says about itself, in its metadata.

    Attributes:
        config: of the model; `n_tokens` says which logits may be sampled.
        flavour: "portable" has basic operators only, "ort" has ONNX Runtime's fused ones.
        precision: how the weights are stored.
        states: one pair of tensors for each layer, or one for all.
    """

    config: MambaConfig
    flavour: Flavour
    precision: Precision
    states: States = "layers"

    def to_metadata(self) -> dict[str, str]:
        """The `metadata_props` of the graph."""
        return {
            f"{_PREFIX}format_version": str(FORMAT_VERSION),
            f"{_PREFIX}flavour": self.flavour,
            f"{_PREFIX}precision": self.precision,
            f"{_PREFIX}states": self.states,
            f"{_PREFIX}config": json.dumps(self.config.to_hf(), sort_keys=True),
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], *, where: str) -> GraphFacts:
        """Reads what `to_metadata` wrote.

        Raises:
            ArtifactError: the graph is not one of ours, or of an unknown version; `where` names it.
        """
        version = metadata.get(f"{_PREFIX}format_version")
        if version != str(FORMAT_VERSION):
            raise ArtifactError(f"{where}: expected a graph of yunmin's format {FORMAT_VERSION}, found {version!r}")
        found: dict[str, Any] = {}
        for key, known in (("flavour", Flavour), ("precision", Precision), ("states", States)):
            found[key] = metadata.get(_PREFIX + key)
            if found[key] not in get_args(known):
                raise ArtifactError(f"{where}: {key}: expected {' or '.join(get_args(known))}, found {found[key]!r}")
        try:
            config = MambaConfig.from_dict(_json_object(metadata.get(f"{_PREFIX}config", "")), where="its config")
        except ConfigError as error:
            raise ArtifactError(f"{where}: {error}") from None
        return cls(config, **found)


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"its config: expected JSON, {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"its config: expected a JSON object, found {found!r:.60}")
    return found
