"""A folder that ONNX Runtime GenAI generates from, made of an artifact with a graph.

    python -m export.onnx_graph.genai artifact/ genai/

GenAI 0.18 carries recurrent states under the names that our graphs have. It reads the logits of the last position only,
where a graph declares one position; and it samples any id that there is a logit for, so that padding of the vocabulary
is cut off. It makes the states of all layers after the first one's, so that layers of unequal widths are refused. And
it pads prompts of unequal lengths, which a recurrent state does not forget: give the prompts of a batch equal lengths.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from yunmin.artifact import read_manifest
from yunmin.cli import run
from yunmin.config import MambaConfig
from yunmin.errors import ArtifactError, ConfigError
from yunmin.files import atomic_folder, write_json
from yunmin.runtime.onnx_contract import (
    GRAPH_FILE,
    GRAPH_FOLDER,
    INPUT_IDS,
    KEPT_LOGITS,
    LOGITS,
    SESSION_CONFIG,
    GraphFacts,
)
from yunmin.tokenizer import copy_tokenizer

CONFIG_FILE = "genai_config.json"
_CONTEXT = 1_048_576  # a recurrent state has no longest context, but GenAI wants a number
_PADDED = "padded_logits"


def write_genai(out: Path, artifact: Path) -> None:
    """Writes the graph as GenAI takes it, its configuration and the tokenizer, whole or not at all.

    Args:
        out: new folder.
        artifact: with a graph, in any precision and flavour.

    Raises:
        ArtifactError: the artifact has no graph, is damaged, or `out` exists.
        ConfigError: the model is none that GenAI takes.
    """
    read_manifest(artifact)
    source = artifact / GRAPH_FOLDER / GRAPH_FILE
    if not source.is_file():
        raise ArtifactError(f"{artifact}: has no ONNX graph; export it with --onnx")
    if out.exists():
        raise ArtifactError(f"{out}: exists already")
    model = onnx.load(source, load_external_data=False)
    facts = GraphFacts.from_metadata({p.key: p.value for p in model.metadata_props}, where=str(source))
    if facts.states != "layers":
        raise ArtifactError(f"{source}: states: expected a pair for each layer, found {facts.states}")
    configured = genai_config(facts.config)
    _keep_last_logits(model, facts.config)
    with atomic_folder(out) as folder:
        onnx.save(model, folder / GRAPH_FILE)
        data = source.with_name(f"{GRAPH_FILE}.data")
        if data.is_file():
            shutil.copyfile(data, folder / data.name)
        copy_tokenizer(artifact, folder)
        write_json(folder / CONFIG_FILE, configured)


def genai_config(config: MambaConfig) -> dict[str, Any]:
    """The contents of `genai_config.json`.

    Raises:
        ConfigError: the model has no token that ends a text, or layers of unequal widths; GenAI takes neither.
    """
    for name, widths in (("d_inner", config.d_inner), ("d_state", config.d_state)):
        if other := next((i for i, width in enumerate(widths) if width != widths[0]), None):
            raise ConfigError(
                f"layer {other}: expected {name} {widths[0]} as in layer 0, found {widths[other]}: ONNX Runtime GenAI "
                "makes all layers' states after the first one's; export without unequal widths"
            )
    if not config.eos_token_ids:
        raise ConfigError(
            "eos_token_id: expected a token that ends a text, which ONNX Runtime GenAI requires, found none"
        )
    end = config.eos_token_ids[0]
    decoder = {
        "filename": GRAPH_FILE,
        "session_options": SESSION_CONFIG,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        # attention there is none, but these are required
        "head_size": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "layer_types": ["linear_attention"] * config.n_layers,
        "inputs": {
            "input_ids": INPUT_IDS,
            "past_conv_names": "past_key_values.%d.conv_state",
            "past_recurrent_names": "past_key_values.%d.recurrent_state",
        },
        "outputs": {
            "logits": LOGITS,
            "present_conv_names": "present.%d.conv_state",
            "present_recurrent_names": "present.%d.recurrent_state",
        },
    }
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": end if config.bos_token_id is None else config.bos_token_id,
            "eos_token_id": list(config.eos_token_ids),
            "pad_token_id": end if config.pad_token_id is None else config.pad_token_id,
            "vocab_size": config.n_tokens,
            "context_length": _CONTEXT,
            "decoder": decoder,
        },
        "search": {"do_sample": False, "max_length": _CONTEXT, "past_present_share_buffer": False},
    }


def _keep_last_logits(model: onnx.ModelProto, config: MambaConfig) -> None:
    """Fixes the logits to those of the last position and of the tokens that exist: float32 (B, 1, n_tokens)."""
    graph = model.graph
    kept = [value for value in graph.input if value.name != KEPT_LOGITS]  # its default, 1, becomes a constant
    del graph.input[:]
    graph.input.extend(kept)
    if config.n_tokens < config.vocab_size:
        last = next(node for node in graph.node if LOGITS in node.output)
        last.output[list(last.output).index(LOGITS)] = _PADDED
        bounds = {"first_token": 0, "n_tokens": config.n_tokens, "vocabulary_axis": 2}
        graph.initializer.extend(helper.make_tensor(name, TensorProto.INT64, [1], [v]) for name, v in bounds.items())
        graph.node.append(helper.make_node("Slice", [_PADDED, *bounds], [LOGITS], name="cut_padding"))
    logits = next(value for value in graph.output if value.name == LOGITS)
    logits.CopyFrom(helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ["batch", 1, config.n_tokens]))


def main(argv: list[str]) -> int:
    """`python -m export.onnx_graph.genai ARTIFACT OUT`."""
    arguments = argparse.ArgumentParser("python -m export.onnx_graph.genai", description=write_genai.__doc__)
    arguments.add_argument("artifact", type=Path, help="artifact exported with --onnx")
    arguments.add_argument("out", type=Path, help="new folder for ONNX Runtime GenAI")
    options = arguments.parse_args(argv)
    write_genai(options.out, options.artifact)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
