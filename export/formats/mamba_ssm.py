"""The original implementation's format, for `mamba_ssm.models.mixer_seq_simple.MambaLMHeadModel.from_pretrained`.

That class builds itself from `config.json`, in which an unknown key is an error, and loads `pytorch_model.bin`
strictly, a tied head included. Keys of its later versions are written only where they are needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.formats.hf import require_uniform
from yunmin.checkpoint import Checkpoint
from yunmin.config import MambaConfig
from yunmin.errors import ConfigError
from yunmin.files import write_json

_NORM_EPS = 1e-5  # not configurable there
_WIDEST_STATE = 256  # of its scan kernel
_USUAL_MULTIPLE = 8  # rows of the embedding that published models are padded to


def check(config: MambaConfig) -> None:
    """Refuses what `mamba_ssm`'s config cannot say.

    Raises:
        ConfigError: names the layer or the value, and the reason.
    """
    require_uniform("mamba_ssm", "mamba_ssm", config)
    if config.d_inner[0] % config.d_model:
        raise ConfigError(
            f"--format mamba_ssm: d_inner must be a multiple of d_model {config.d_model}, found {config.d_inner[0]}: "
            "mamba_ssm sizes its states by d_model * expand, and cannot generate with a fractional expand"
        )
    if config.d_state[0] > _WIDEST_STATE:
        raise ConfigError(
            f"--format mamba_ssm: d_state must be at most {_WIDEST_STATE}, as its scan kernel takes, "
            f"found {config.d_state[0]}"
        )
    if config.norm_eps != _NORM_EPS:
        raise ConfigError(f"--format mamba_ssm: norm_eps is always {_NORM_EPS:g} there, found {config.norm_eps:g}")


def config_of(config: MambaConfig) -> dict[str, Any]:
    """The `config.json` of `mamba_ssm`, which gives vocabulary and padding apart."""
    untied = {} if config.tie_word_embeddings else {"tie_embeddings": False}
    return {
        "d_model": config.d_model,
        "n_layer": config.n_layers,
        "vocab_size": config.n_tokens,
        "ssm_cfg": {
            "d_state": config.d_state[0],
            "d_conv": config.d_conv,
            "expand": config.d_inner[0] // config.d_model,
            "dt_rank": config.dt_rank,
            "conv_bias": config.use_conv_bias,
            "bias": config.use_bias,
        },
        "rms_norm": True,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": _padding_multiple(config),
        **untied,
    }


def state_dict_of(config: MambaConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of `MambaLMHeadModel.state_dict()`; a tied head shares the embedding's memory.

    Args:
        config: the architecture.
        tensors: by Hugging Face name.
    """
    renamed = {
        name.replace("backbone.embeddings.", "backbone.embedding."): tensor.detach().contiguous()
        for name, tensor in tensors.items()
    }
    if config.tie_word_embeddings:
        renamed["lm_head.weight"] = renamed["backbone.embedding.weight"]
    return renamed


def write(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes config, weights, and end-of-text ids, for which `mamba_ssm` has no place but other readers have.

    Args:
        folder: exists already.
        checkpoint: float32 weights of a model that passes `check`.

    Raises:
        OSError: the folder cannot be written.
    """
    config = checkpoint.config
    write_json(folder / "config.json", config_of(config))
    try:
        torch.save(state_dict_of(config, checkpoint.tensors), folder / "pytorch_model.bin")
    except RuntimeError as error:  # how torch says that the disk is full
        raise OSError(f"pytorch_model.bin: {str(error).splitlines()[0]}") from None
    if config.eos_token_ids:
        write_json(folder / "generation_config.json", {"eos_token_id": list(config.eos_token_ids)})


def _padding_multiple(config: MambaConfig) -> int:
    """The multiple that pads `n_tokens` to `vocab_size`: 8 where that does, else the smallest."""
    padding = config.vocab_size - config.n_tokens
    candidates: list[int] = [_USUAL_MULTIPLE, *range(padding + 1, config.vocab_size + 1)]
    return next(m for m in candidates if m > padding and config.vocab_size % m == 0)
