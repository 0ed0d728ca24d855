"""GGUF files: read back with the `gguf` package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import normalizers, pre_tokenizers
from torch import Tensor

from export.cli import main as export_main
from export.compact import compact_model, read_source
from export.gguf import GGUF_TYPES, write_gguf
from export.gguf_readback import checkpoint_tensors
from tests.export.fixtures import TEXT, ia3, lora, write_source
from tests.models import random_pillars, random_tensors
from yunmin.cli import run
from yunmin.config import MambaConfig
from yunmin.errors import ConfigError, MissingExtraError, TokenizerError
from yunmin.tokenizer import Tokenizer

BLOCK = {"F32": 1, "F16": 1, "Q8_0": 32, "Q4_0": 32}
# of the largest weight in a block: half a step of 127 (Q8_0), a whole one of 8 (Q4_0, which has fewer
# positive steps than negative ones), and the rounding of the scale to F16
ERROR = {"F32": 0.0, "F16": 2**-11, "Q8_0": 0.5 / 127 + 2**-11, "Q4_0": 1 / 8 + 2**-11}


def config_for_llama(**options: Any) -> MambaConfig:
    """A shape that llama.cpp takes, with the rank of the step size no multiple of a block."""
    values: dict[str, Any] = {"vocab_size": 320, "d_model": 32, "n_layers": 2, "d_state": 6, "dt_rank": 3}
    return MambaConfig.create(**values | options)


def read_back(path: Path) -> dict[str, tuple[str, Tensor]]:
    """Name -> (GGML type, dequantized values in our order of axes)."""
    reader = gguf.GGUFReader(path)
    return {
        t.name: (t.tensor_type.name, torch.from_numpy(np.array(gguf.dequantize(t.data, t.tensor_type))))
        for t in reader.tensors
    }


def field(path: Path, key: str) -> Any:
    found = gguf.GGUFReader(path).get_field(key)
    return None if found is None else found.contents()


def expected_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """llama.cpp's names and layouts, spelled out."""
    found = {"token_embd.weight": tensors["backbone.embeddings.weight"]}
    found["output_norm.weight"] = tensors["backbone.norm_f.weight"]
    if "lm_head.weight" in tensors:
        found["output.weight"] = tensors["lm_head.weight"]
    for layer in range(2):
        ours, theirs = f"backbone.layers.{layer}.", f"blk.{layer}."
        mixer = ours + "mixer."
        found[theirs + "attn_norm.weight"] = tensors[ours + "norm.weight"]
        found[theirs + "ssm_a"] = -tensors[mixer + "A_log"].exp()
        found[theirs + "ssm_d"] = tensors[mixer + "D"]
        found[theirs + "ssm_conv1d.weight"] = tensors[mixer + "conv1d.weight"][:, 0]
        found[theirs + "ssm_conv1d.bias"] = tensors.get(mixer + "conv1d.bias", torch.zeros(64))
        found[theirs + "ssm_dt.weight"] = tensors[mixer + "dt_proj.weight"]
        found[theirs + "ssm_dt.bias"] = tensors[mixer + "dt_proj.bias"]
        for name, projection in (("ssm_in", "in_proj"), ("ssm_x", "x_proj"), ("ssm_out", "out_proj")):
            found[f"{theirs}{name}.weight"] = tensors[f"{mixer}{projection}.weight"]
    return found


@pytest.mark.parametrize("kind", GGUF_TYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_file_holds_every_tensor_under_llama_cpps_name_in_its_type(tmp_path: Path, kind: str, tied: bool) -> None:
    config = config_for_llama(tie_word_embeddings=tied)
    tensors = random_tensors(config)
    write_gguf(tmp_path / "model.gguf", config, tensors, kind=kind)
    found, expected = read_back(tmp_path / "model.gguf"), expected_tensors(tensors)
    assert found.keys() == expected.keys()
    for name, (stored_as, values) in found.items():
        is_matrix = expected[name].dim() == 2 and name.endswith(".weight") and "conv1d" not in name
        if not is_matrix:
            assert stored_as == "F32"
            assert torch.equal(values, expected[name]), name
        elif expected[name].shape[-1] % BLOCK[kind]:
            assert stored_as == "F16", name  # as llama.cpp's converter does where a row is no whole number of blocks
            assert torch.equal(values, expected[name].half().float())
        else:
            assert stored_as == kind
            blocks = (-1, BLOCK[kind])
            largest = expected[name].reshape(blocks).abs().amax(1, keepdim=True)
            error = (values.reshape(blocks) - expected[name].reshape(blocks)).abs()
            assert bool((error <= ERROR[kind] * largest + 1e-7).all()), name


def test_metadata_is_what_llama_cpp_reads(tmp_path: Path) -> None:
    config = config_for_llama(norm_eps=1e-4)
    write_gguf(tmp_path / "model.gguf", config, random_tensors(config), name="small")
    expected = {
        "general.architecture": "mamba",
        "general.name": "small",
        "mamba.block_count": 2,
        "mamba.embedding_length": 32,
        "mamba.ssm.conv_kernel": 4,
        "mamba.ssm.inner_size": 64,
        "mamba.ssm.state_size": 6,
        "mamba.ssm.time_step_rank": 3,
        "mamba.attention.layer_norm_rms_epsilon": pytest.approx(1e-4),
        "mamba.vocab_size": 320,
        "tokenizer.ggml.model": "no_vocab",
    }
    assert {key: field(tmp_path / "model.gguf", key) for key in expected} == expected


def test_a_convolution_without_bias_gets_one_of_zeros(tmp_path: Path) -> None:
    config = config_for_llama(use_conv_bias=False)
    write_gguf(tmp_path / "model.gguf", config, random_tensors(config))
    assert torch.equal(read_back(tmp_path / "model.gguf")["blk.1.ssm_conv1d.bias"][1], torch.zeros(64))


def test_tokenizer_section_has_every_row_of_the_embedding(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train([TEXT], 300)
    config = config_for_llama()
    write_gguf(tmp_path / "model.gguf", config, random_tensors(config), tokenizer=tokenizer)
    tokens = field(tmp_path / "model.gguf", "tokenizer.ggml.tokens")
    known = tokenizer.vocab_size
    assert len(tokens) == 320
    assert tokens[:known] == [tokenizer.backend.id_to_token(i) for i in range(known)]
    assert tokens[known:] == [f"[PAD{i}]" for i in range(known, 320)]
    types = field(tmp_path / "model.gguf", "tokenizer.ggml.token_type")
    assert types[tokenizer.eos_id] == gguf.TokenType.CONTROL
    assert set(types[known:]) == {gguf.TokenType.UNUSED}
    assert field(tmp_path / "model.gguf", "tokenizer.ggml.eos_token_id") == tokenizer.eos_id
    assert len(field(tmp_path / "model.gguf", "tokenizer.ggml.merges")) == known - 257


def test_padding_of_the_vocabulary_is_left_out_with_the_ids_that_name_it(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train([TEXT], 300)
    config = config_for_llama(n_tokens=300, tie_word_embeddings=False, pad_token_id=319, eos_token_ids=(0, 310))
    tensors = random_tensors(config)
    out = tmp_path / "model.gguf"
    write_gguf(out, config, tensors, tokenizer=tokenizer)
    found = read_back(out)
    assert torch.equal(found["token_embd.weight"][1], tensors["backbone.embeddings.weight"][:300])
    assert torch.equal(found["output.weight"][1], tensors["lm_head.weight"][:300])
    assert len(field(out, "tokenizer.ggml.tokens")) == 300
    assert [field(out, f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "padding")] == [0, None, None]


def test_three_ids_may_end_a_text_and_a_fourth_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train([TEXT], 300)
    config = config_for_llama(eos_token_ids=(9, 8, 0))
    write_gguf(tmp_path / "model.gguf", config, random_tensors(config), tokenizer=tokenizer)
    ends = [field(tmp_path / "model.gguf", f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
    assert ends == [0, 9, 8]
    config = config_for_llama(eos_token_ids=(9, 8, 0, 7))
    with pytest.raises(TokenizerError, match="places for 3 ids that end a text, found 4"):
        write_gguf("never.gguf", config, random_tensors(config), tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("pre_tokenizer", pre_tokenizers.Whitespace(), "expected the pre-tokenizer ByteLevel .* found .*Whitespace"),
        ("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True), "no prefix space, found"),
        ("normalizer", normalizers.Lowercase(), "expected no normalizer but NFC, found .*Lowercase"),
        ("model.ignore_merges", True, "has no ignore_merges"),
    ],
)
def test_a_tokenizer_that_splits_otherwise_is_refused(option: str, value: Any, message: str) -> None:
    tokenizer = Tokenizer.train([TEXT], 300)
    owner, _, attribute = option.rpartition(".")
    setattr(getattr(tokenizer.backend, owner) if owner else tokenizer.backend, attribute, value)
    config = config_for_llama()
    with pytest.raises(TokenizerError, match=message):
        write_gguf("never.gguf", config, random_tensors(config), tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            config_for_llama().with_widths(d_inner=(64, 48)),
            "layer 1: llama.cpp's mamba takes d_inner = 2 * d_model = 64 only, found 48",
        ),
        (
            config_for_llama().with_widths(d_state=(6, 4)),
            "layer 1: llama.cpp's mamba takes one d_state for all layers, found 4 beside 6",
        ),
        (config_for_llama(use_bias=True), "has no biases on in_proj and out_proj, found use_bias true"),
    ],
)
def test_what_llama_cpp_cannot_express_is_refused_and_writes_nothing(
    tmp_path: Path, config: MambaConfig, message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        write_gguf(tmp_path / "model.gguf", config, random_tensors(config))
    assert message in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_unknown_type_is_refused() -> None:
    config = config_for_llama()
    with pytest.raises(ConfigError, match="expected one of F32, F16, Q8_0, Q4_0, found 'Q5_K'"):
        write_gguf("never.gguf", config, random_tensors(config), kind="Q5_K")


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    config = config_for_llama()
    with pytest.raises(MissingExtraError, match=r"pip install 'yunmin\[gguf\]'"):
        write_gguf("never.gguf", config, random_tensors(config))


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_command_writes_the_merged_cut_and_ordered_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    config = config_for_llama()
    pillars = random_pillars(config)
    pillars = replace(pillars, channel_gates=tuple(gate.clamp(min=0.2) for gate in pillars.channel_gates))
    adapters = {"lora": lora("in_proj", "dt_proj"), "ia3": ia3("x_proj", "out_proj", inputs=("out_proj",))}
    source = write_source(tmp_path / "source", config, pillars=pillars, adapters=adapters)
    out = tmp_path / "model.gguf"
    command = [str(source), str(out), "--format", "gguf", "--gguf-type", kind.lower()]
    assert run(export_main, command) == 0
    assert "model.gguf: written as gguf, read back and compared" in capsys.readouterr().out
    expected = compact_model(read_source(source)).cast(torch.float32).tensors
    found = checkpoint_tensors(out)
    limit = 1e-6 if kind == "F32" else ERROR[kind] + ERROR["F16"]
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert (found[name] - values).abs().max() <= limit * values.abs().max(), name
    assert field(out, "mamba.ssm.state_size") == 4  # of 6
    assert read_back(out)["blk.1.ssm_out.weight"][0] == kind
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "source"]
