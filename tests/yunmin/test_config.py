"""`MambaConfig`: what is read, what is refused, and by which name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.models import hf_model, small_config
from yunmin.config import MambaConfig
from yunmin.errors import ConfigError

# config.json of state-spaces/mamba-130m-hf and of state-spaces/mamba-130m, as they are on the Hub
MAMBA_130M_HF: dict[str, Any] = {
    "architectures": ["MambaForCausalLM"],
    "bos_token_id": 0,
    "conv_kernel": 4,
    "d_inner": 1536,
    "d_model": 768,
    "eos_token_id": 0,
    "expand": 2,
    "fused_add_norm": True,
    "hidden_act": "silu",
    "hidden_size": 768,
    "initializer_range": 0.1,
    "intermediate_size": 1536,
    "layer_norm_epsilon": 1e-05,
    "model_type": "mamba",
    "n_layer": 24,
    "num_hidden_layers": 24,
    "pad_token_id": 0,
    "pad_vocab_size_multiple": 8,
    "rescale_prenorm_residual": False,
    "residual_in_fp32": True,
    "rms_norm": True,
    "ssm_cfg": {},
    "state_size": 16,
    "time_step_floor": 0.0001,
    "time_step_init_scheme": "random",
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "time_step_rank": 48,
    "time_step_scale": 1.0,
    "torch_dtype": "float32",
    "transformers_version": "4.39.0.dev0",
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "vocab_size": 50280,
}
MAMBA_130M: dict[str, Any] = {
    "d_model": 768,
    "n_layer": 24,
    "vocab_size": 50277,
    "ssm_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}


def test_the_config_of_mamba_130m_hf_is_read() -> None:
    config = MambaConfig.from_dict(MAMBA_130M_HF)
    assert (config.d_model, config.n_layers, config.dt_rank, config.d_conv) == (768, 24, 48, 4)
    assert config.d_inner == (1536,) * 24
    assert config.d_state == (16,) * 24
    assert (config.vocab_size, config.n_tokens) == (50280, 50280)
    assert config.eos_token_ids == (0,)
    assert config.tie_word_embeddings


def test_the_config_of_mamba_130m_for_mamba_ssm_is_read_and_its_padding_known() -> None:
    config = MambaConfig.from_dict(MAMBA_130M)
    assert (config.vocab_size, config.n_tokens) == (50280, 50277)
    assert (config.d_model, config.n_layers, config.dt_rank) == (768, 24, 48)
    assert config.d_inner == (1536,) * 24
    assert config.tie_word_embeddings


def test_ssm_cfg_of_mamba_ssm_is_read() -> None:
    ssm = {"d_state": 24, "d_conv": 3, "expand": 1.5, "dt_rank": 5, "conv_bias": False, "bias": True, "dt_min": 0.01}
    config = MambaConfig.from_dict(MAMBA_130M | {"ssm_cfg": ssm, "tie_embeddings": False})
    assert (config.d_state[0], config.d_conv, config.d_inner[0], config.dt_rank) == (24, 3, 1152, 5)
    assert (config.use_conv_bias, config.use_bias, config.time_step_min) == (False, True, 0.01)
    assert not config.tie_word_embeddings


@pytest.mark.parametrize(
    "config",
    [
        small_config(),
        small_config(tie_word_embeddings=True, eos_token_ids=(1, 2), bos_token_id=3, pad_token_id=4, n_tokens=290),
        small_config(d_inner=(40, 24), d_state=(5, 8), use_conv_bias=False, residual_in_fp32=False),
        MambaConfig.create(vocab_size=50, d_model=32, n_layers=3, expand=3, d_conv=2),
    ],
)
def test_a_written_config_reads_back_the_same(config: MambaConfig) -> None:
    assert MambaConfig.from_dict(json.loads(json.dumps(config.to_hf()))) == config


def test_every_key_that_transformers_writes_is_known(tmp_path: Path) -> None:
    hf_model(use_bias=True, expand=3, state_size=11, conv_kernel=3).save_pretrained(tmp_path)
    config = MambaConfig.from_file(tmp_path / "config.json")
    assert (config.d_inner, config.d_state, config.d_conv, config.use_bias) == ((72, 72), (11, 11), 3, True)


def test_uniform_widths_are_written_as_transformers_reads_them() -> None:
    from transformers import MambaConfig as HFConfig

    config = small_config()
    assert not config.with_widths(d_inner=(40, 24)).is_uniform
    theirs = HFConfig(**config.to_hf())
    assert (theirs.intermediate_size, theirs.state_size, theirs.time_step_rank) == (40, 5, 3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "mamba2"}, "model_type must be 'mamba', got 'mamba2'"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, "ssm_cfg.layer must be 'Mamba1', got 'Mamba2'"),
        ({"ssm_cfg": []}, "ssm_cfg must be an object"),
        ({"rms_norm": False}, "rms_norm must be true"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"sliding_window": 4}, "unknown key 'sliding_window'"),
        ({"hidden_size": 0}, "hidden_size must be a positive integer, got 0"),
        ({"hidden_size": 768.0}, "hidden_size must be a positive integer"),
        ({"num_hidden_layers": "24"}, "num_hidden_layers must be a positive integer, got '24'"),
        ({"vocab_size": True}, "vocab_size must be a positive integer, got True"),
        ({"state_size": -1}, "state_size must be a positive integer, got -1"),
        ({"state_size": [16]}, "state_size lists 1 widths for 24 layers"),
        ({"intermediate_size": [[1]] * 24}, r"intermediate_size\[0\] must be a positive integer"),
        ({"intermediate_size": 1000}, "d_inner is 1536 and intermediate_size is 1000"),
        ({"d_model": 512}, "d_model is 512 and hidden_size is 768"),
        ({"expand": float("nan")}, "expand must be a positive number"),
        ({"expand": "2"}, "expand must be a positive number"),
        ({"conv_kernel": 1}, "d_conv must be an integer >= 2, got 1"),
        ({"time_step_rank": "large"}, "dt_rank must be 'auto' or a positive integer, got 'large'"),
        ({"time_step_rank": 0}, "dt_rank must be a positive integer, got 0"),
        ({"layer_norm_epsilon": 0}, "norm_eps must be a positive number, got 0"),
        ({"time_step_scale": "big"}, "time_step_scale must be a positive number, got 'big'"),
        ({"time_step_min": 0.5}, "time_step_min 0.5 exceeds time_step_max 0.1"),
        ({"time_step_init_scheme": "zeros"}, "time_step_init_scheme must be"),
        ({"use_bias": 1}, "use_bias must be true or false, got 1"),
        ({"rescale_prenorm_residual": "no"}, "rescale_prenorm_residual must be true or false"),
        ({"eos_token_id": 50280}, r"eos_token_id must be an integer in 0\.\.50279, got 50280"),
        ({"eos_token_id": ["a"]}, "eos_token_id must be an integer"),
        ({"pad_token_id": -1}, "pad_token_id must be an integer"),
        ({"bos_token_id": 1.5}, "bos_token_id must be an integer"),
        ({"n_tokens": 0}, "n_tokens must be a positive integer, got 0"),
        ({"n_tokens": 60000}, "n_tokens must be at most vocab_size 50280, got 60000"),
    ],
)
def test_an_impossible_hugging_face_config_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"^config.json: .*{named}"):
        MambaConfig.from_dict(MAMBA_130M_HF | change)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ssm_cfg": {"layer": "Mamba2"}}, "ssm_cfg.layer must be 'Mamba1', got 'Mamba2'"),
        ({"ssm_cfg": {"headdim": 64}}, "unknown key ssm_cfg.'headdim'"),
        ({"ssm_cfg": None}, "ssm_cfg must be an object"),
        ({"ssm_cfg": {"expand": "2"}}, "expand must be a positive number, got '2'"),
        ({"ssm_cfg": {"d_state": 1.5}}, r"d_state\[0\] must be a positive integer"),
        ({"rms_norm": False}, "rms_norm must be true"),
        ({"d_intermediate": 512}, "d_intermediate must be 0"),
        ({"attn_layer_idx": [3]}, "attn_layer_idx must be empty"),
        ({"hidden_layers": 3}, "unknown key 'hidden_layers'"),
        ({"n_layer": 0}, "n_layer must be a positive integer, got 0"),
        ({"vocab_size": None}, "vocab_size must be a positive integer, got None"),
        ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple must be a positive integer"),
    ],
)
def test_an_impossible_mamba_ssm_config_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"^config.json: .*{named}"):
        MambaConfig.from_dict(MAMBA_130M | change)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "found no such file"),
        (b"{", "expected JSON"),
        (b"[1]", "expected a JSON object, found list"),
        (b"\xff", "expected JSON"),
        (b'{"n_head": 3}', "expected a Mamba config"),
    ],
)
def test_a_damaged_config_file_is_refused_with_its_path(tmp_path: Path, content: bytes | None, named: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=named) as caught:
        MambaConfig.from_file(path)
    assert str(path) in str(caught.value)
