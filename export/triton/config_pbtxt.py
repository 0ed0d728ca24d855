"""The `config.pbtxt` of both kinds of models, in protobuf's text format.

No instance groups are named: Triton then makes one instance per GPU where there are GPUs, and one on the CPU elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from yunmin.config import MambaConfig
from yunmin.runtime.onnx_contract import GRAPH_FILE, INPUT_IDS, LOGITS, state_tensors
from yunmin.triton_contract import (
    IDS_INPUT,
    IDS_OUTPUT,
    REASON_OUTPUT,
    SAMPLING_INPUT,
    STREAM_INPUT,
    TEXT_INPUT,
    TEXT_OUTPUT,
)

_IDLE_MICROSECONDS = 60_000_000  # a sequence that asks nothing for so long loses its state


def onnx_config(
    name: str, config: MambaConfig, *, max_sequences: int, initial_files: Mapping[str, str] | None = None
) -> str:
    """Of the graph: a sequence's requests are token ids, its state stays in the server.

    Args:
        name: of the model.
        config: of the graph.
        max_sequences: that run at a time, and the largest batch.
        initial_files: for each past tensor's name, the file that a new sequence's state is read from; None for zeros.
    """
    states = "".join(
        f"""    {{
      input_name: {_text(state.past)}
      output_name: {_text(state.present)}
      data_type: TYPE_FP32
      dims: [ {state.shape[0]} ]
      initial_state: {{
        name: {_text(state.past)}
        data_type: TYPE_FP32
        dims: [ {state.shape[0]} ]
        {"zero_data: true" if initial_files is None else f"data_file: {_text(initial_files[state.past])}"}
      }}
    }},
"""
        for state in state_tensors(config, "stacked")
    )
    return f"""# ids of one sequence in (the prompt, then one at a time), logits after the last of them out
name: {_text(name)}
backend: "onnxruntime"
default_model_filename: {_text(GRAPH_FILE)}
max_batch_size: {max_sequences}
input [
  {{ name: {_text(INPUT_IDS)}, data_type: TYPE_INT64, dims: [ -1 ] }}
]
output [
  {{ name: {_text(LOGITS)}, data_type: TYPE_FP32, dims: [ -1, {config.vocab_size} ] }}
]
sequence_batching {{
  max_sequence_idle_microseconds: {_IDLE_MICROSECONDS}
  oldest {{ max_candidate_sequences: {max_sequences} }}
  state [
{states.rstrip().removesuffix(",")}
  ]
}}
"""


def text_config(name: str, settings: Mapping[str, str]) -> str:
    """Of the model that takes text and streams text.

    Args:
        name: of the model.
        settings: parameters that differ from their defaults, see `yunmin.triton_contract.SETTINGS`.
    """
    parameters = "".join(
        f"parameters {{ key: {_text(key)}, value: {{ string_value: {_text(value)} }} }}\n"
        for key, value in sorted(settings.items())
    )
    return f"""# text in, text out, as it comes where `stream` is true
name: {_text(name)}
backend: "python"
max_batch_size: 0
model_transaction_policy {{ decoupled: true }}
input [
  {{ name: {_text(TEXT_INPUT)}, data_type: TYPE_STRING, dims: [ 1 ], optional: true }},
  {{ name: {_text(IDS_INPUT)}, data_type: TYPE_INT64, dims: [ -1 ], optional: true }},
  {{ name: {_text(STREAM_INPUT)}, data_type: TYPE_BOOL, dims: [ 1 ], optional: true }},
  {{ name: {_text(SAMPLING_INPUT)}, data_type: TYPE_STRING, dims: [ 1 ], optional: true }}
]
output [
  {{ name: {_text(TEXT_OUTPUT)}, data_type: TYPE_STRING, dims: [ 1 ] }},
  {{ name: {_text(IDS_OUTPUT)}, data_type: TYPE_INT64, dims: [ -1 ] }},
  {{ name: {_text(REASON_OUTPUT)}, data_type: TYPE_STRING, dims: [ 1 ] }}
]
# settings of the engine, as `yunmin serve --help` explains them; more of them may be set here
{parameters}"""


def _text(value: str) -> str:
    return json.dumps(value)
