"""GGUF files for llama.cpp's `mamba` architecture, as its own converter lays them out.

Names, metadata and the choice of what stays in float32 follow `conversion/mamba.py` and `conversion/base.py` of
llama.cpp: A is stored as -exp(A_log), the convolution without its middle axis; vectors, norms, the convolution, A and D
stay F32; a matrix whose rows are no multiple of the format's block is stored in F16, as there. Unlike `llama-quantize`,
which keeps the head in Q6_K, every matrix takes the one type asked for. Padding of the vocabulary is left out, since
llama.cpp samples any row that there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from export.gguf_readback import require_faithful
from export.gguf_tokenizer import TokenTable, token_table
from yunmin.axes import layer_prefix
from yunmin.config import MambaConfig
from yunmin.errors import ConfigError, MissingExtraError, TokenizerError
from yunmin.files import atomic_file
from yunmin.model import check_tensors
from yunmin.tokenizer import Tokenizer

GGUF_TYPES = ("F32", "F16", "Q8_0", "Q4_0")
_FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "Q8_0": "MOSTLY_Q8_0", "Q4_0": "MOSTLY_Q4_0"}
_BY_TOKEN = ("backbone.embeddings.weight", "lm_head.weight")
_CONTEXT_LENGTH = 2**20  # the converter's: a Mamba has no limit, and readers want a number

Array = npt.NDArray[Any]


def write_gguf(
    path: str | Path,
    config: MambaConfig,
    tensors: Mapping[str, Tensor],
    *,
    kind: str = "F32",
    tokenizer: Tokenizer | None = None,
    chat_template: str | None = None,
    name: str = "mamba",
    report: Callable[[str], None] | None = None,
) -> None:
    """Writes a model as one GGUF file, whole and read back, or not at all.

    Args:
        path: the file.
        config: the architecture.
        tensors: float weights by Hugging Face name, as `yunmin.checkpoint.Checkpoint.tensors`.
        kind: type of the matrices, one of `GGUF_TYPES`.
        tokenizer: goes into the file; without one it says so ("no_vocab") and takes token ids only.
        chat_template: Jinja source, for servers that read it from the file.
        name: of the model, for its reader.
        report: called with the name of each stage as it begins.

    Raises:
        ConfigError: an unknown type, or a shape that llama.cpp does not take.
        CheckpointError: the tensors do not fit the config.
        TokenizerError: a tokenizer that llama.cpp would split in another way.
        VerificationError: a weight is further from what was asked for than the type's rounding, as one beyond the
            range of F16 is.
        MissingExtraError: the package `gguf` is not installed.
    """
    say = report or (lambda _: None)
    if kind not in GGUF_TYPES:
        raise ConfigError(f"GGUF type: expected one of {', '.join(GGUF_TYPES)}, found {kind!r}")
    gguf = _gguf()
    check_tensors(config, tensors)
    check_fits_llama_cpp(config)
    rows = config.n_tokens if tokenizer is None else max(config.n_tokens, tokenizer.vocab_size)
    if rows > config.vocab_size:
        raise TokenizerError(
            f"the tokenizer has {rows} ids: expected at most {config.vocab_size}, the model's vocabulary"
        )
    config, tensors = _with_rows(rows, config, tensors)
    table = None if tokenizer is None else token_table(tokenizer, config)
    with atomic_file(path) as aside:
        say(f"writing GGUF ({kind})")
        with closing(gguf.GGUFWriter(aside, "mamba")) as writer:
            _add_metadata(writer, gguf, config, kind, name)
            _add_tokenizer(writer, config, table)
            if chat_template is not None:
                writer.add_chat_template(chat_template)
            for tensor_name, values, dtype in gguf_tensors(config, tensors, kind):
                writer.add_tensor(tensor_name, values, raw_dtype=dtype)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        del writer  # and the tensors in it
        say("verifying what was written")
        require_faithful(aside, config, tensors, str(path))


def gguf_type_named(name: str) -> str:
    """One of `GGUF_TYPES`, given in any case.

    Raises:
        ConfigError: there is no such type.
        MissingExtraError: the package `gguf` is not installed.
    """
    if name.upper() not in GGUF_TYPES:
        raise ConfigError(f"GGUF type: expected one of {', '.join(GGUF_TYPES)}, found {name!r}")
    _gguf()
    return name.upper()


def gguf_tensors(config: MambaConfig, tensors: Mapping[str, Tensor], kind: str) -> Iterator[tuple[str, Array, Any]]:
    """The tensors as they lie in the file: llama.cpp's name, values (bytes where quantized), GGML type.

    Args:
        config: the architecture.
        tensors: by Hugging Face name.
        kind: as in `write_gguf`.
    """
    gguf = _gguf()
    from gguf.quants import quantize

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MAMBA, config.n_layers)
    for name, tensor in _with_conv_bias(config, tensors).items():
        values = tensor.detach().float()
        stem, dot, ending = name.rpartition(".")
        if name.endswith(".A_log"):
            values = -torch.exp(values)
        if name.endswith("conv1d.weight"):
            values = values.squeeze(1)  # (D, K)
        has_suffix = ending in ("weight", "bias")
        mapped = names.get_name(stem if has_suffix else name)
        assert mapped is not None, name
        new_name = mapped + (dot + ending if has_suffix else "")
        is_matrix = values.dim() == 2 and ending == "weight" and "conv1d" not in name
        dtype = gguf.GGMLQuantizationType[kind if is_matrix else "F32"]
        if values.shape[-1] % gguf.GGML_QUANT_SIZES[dtype][0] != 0:
            dtype = gguf.GGMLQuantizationType.F16
        with np.errstate(over="ignore"):  # what overflows is found when the file is read back
            stored = quantize(values.contiguous().numpy(), dtype)
        yield new_name, stored, dtype


def _gguf() -> ModuleType:
    try:
        import gguf
    except ModuleNotFoundError:
        raise MissingExtraError("gguf", "gguf", "a GGUF file") from None
    return gguf


def check_fits_llama_cpp(config: MambaConfig) -> None:
    """What `src/models/mamba.cpp` requires: it has "only an expansion factor of 2", and one state size.

    Raises:
        ConfigError: names the layer and the width.
    """
    if config.use_bias:
        raise ConfigError("GGUF: llama.cpp's mamba has no biases on in_proj and out_proj, found use_bias true")
    for layer, (inner, n_state) in enumerate(zip(config.d_inner, config.d_state, strict=True)):
        if inner != 2 * config.d_model:
            raise ConfigError(
                f"GGUF: layer {layer}: llama.cpp's mamba takes d_inner = 2 * d_model = {2 * config.d_model} only, "
                f"found {inner}"
            )
        if n_state != config.d_state[0]:
            raise ConfigError(
                f"GGUF: layer {layer}: llama.cpp's mamba takes one d_state for all layers, found {n_state} "
                f"beside {config.d_state[0]}"
            )


def _with_rows(
    count: int, config: MambaConfig, tensors: Mapping[str, Tensor]
) -> tuple[MambaConfig, Mapping[str, Tensor]]:
    """The model with the first `count` rows of its embedding and head, and without ids of others."""

    def kept(token_id: int | None) -> int | None:
        return token_id if token_id is not None and token_id < count else None

    smaller = replace(
        config,
        vocab_size=count,
        bos_token_id=kept(config.bos_token_id),
        eos_token_ids=tuple(token_id for token_id in config.eos_token_ids if token_id < count),
        pad_token_id=kept(config.pad_token_id),
    )
    return smaller, {**tensors, **{name: tensors[name][:count] for name in _BY_TOKEN if name in tensors}}


def _with_conv_bias(config: MambaConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """llama.cpp always reads a bias of the convolution: a model without one gets zeros, which change nothing."""
    if config.use_conv_bias:
        return dict(tensors)
    zeros = {
        f"{layer_prefix(layer)}mixer.conv1d.bias": torch.zeros(inner) for layer, inner in enumerate(config.d_inner)
    }
    return {**tensors, **zeros}


def _add_metadata(writer: Any, gguf: ModuleType, config: MambaConfig, kind: str, name: str) -> None:
    writer.add_name(name)
    writer.add_context_length(_CONTEXT_LENGTH)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(0)  # not used, but its reader wants it; so the next one
    writer.add_head_count(0)
    writer.add_block_count(config.n_layers)
    writer.add_ssm_conv_kernel(config.d_conv)
    writer.add_ssm_inner_size(config.d_inner[0])
    writer.add_ssm_state_size(config.d_state[0])
    writer.add_ssm_time_step_rank(config.dt_rank)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_ssm_dt_b_c_rms(False)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[kind]])
    if kind != "F32":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(writer: Any, config: MambaConfig, table: TokenTable | None) -> None:
    writer.add_vocab_size(config.vocab_size)
    if table is None:
        writer.add_tokenizer_model("no_vocab")
        return
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(table.tokens)
    writer.add_token_types(table.types)
    writer.add_token_merges(table.merges)
    writer.add_add_bos_token(False)
    ids = {"bos": config.bos_token_id, "pad": config.pad_token_id, **table.end_ids}
    for role, token_id in ids.items():
        if token_id is not None:
            getattr(writer, f"add_{role}_token_id")(token_id)
