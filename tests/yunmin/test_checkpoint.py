"""Checkpoint folders of every kind are read; a damaged one is refused in one line."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import yunmin
from tests.models import hf_model, random_ids, random_tensors, small_config, trained_tokenizer, write_model
from yunmin.checkpoint import find_checkpoint, load_checkpoint
from yunmin.config import MambaConfig
from yunmin.errors import CheckpointError, YunminError
from yunmin.files import write_json
from yunmin.language_model import LanguageModel
from yunmin.model import MambaLM
from yunmin.quantization.reference import network_of

SSM_CONFIG = {"d_model": 24, "n_layer": 2, "vocab_size": 261, "ssm_cfg": {"d_state": 5, "dt_rank": 3}}


def write_mamba_ssm(folder: Path, **changes: Any) -> dict[str, Tensor]:
    folder.mkdir()
    write_json(folder / "config.json", SSM_CONFIG | changes)
    tensors = random_tensors(MambaConfig.from_file(folder / "config.json"))
    raw = {name.replace("embeddings", "embedding"): t for name, t in tensors.items()}
    raw["lm_head.weight"] = raw["backbone.embedding.weight"]
    torch.save(raw, folder / "pytorch_model.bin")
    return tensors


def test_a_mamba_ssm_folder_is_read_and_its_padding_never_sampled(tmp_path: Path) -> None:
    tensors = write_mamba_ssm(tmp_path / "m")
    checkpoint = load_checkpoint(tmp_path / "m")
    assert (checkpoint.config.vocab_size, checkpoint.config.n_tokens) == (264, 261)
    assert all(torch.equal(checkpoint.tensors[n], t) for n, t in tensors.items())
    checkpoint.tensors["backbone.embeddings.weight"][261:] *= 100  # padding rows that would win
    model = LanguageModel.of_network(network_of(checkpoint), None, checkpoint.folder)
    completion = model.generate([1, 2, 3], max_tokens=40, seed=0, temperature=3.0)
    assert max(completion.token_ids) < 261
    with pytest.raises(YunminError, match=r"token ids must lie in 0\.\.260, got 261"):
        model.generate([261])


def test_a_written_folder_loads_in_transformers_with_equal_logits(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for tied in (True, False):
        config = small_config(tie_word_embeddings=tied, eos_token_ids=(0,))
        folder = write_model(tmp_path / str(tied), config, tokenizer=trained_tokenizer())
        theirs = AutoModelForCausalLM.from_pretrained(folder)
        ours = yunmin.load(folder)
        ids = random_ids(config, 2, 9)
        with torch.no_grad():
            torch.testing.assert_close(ours.runtime.forward(ids), theirs(ids).logits, rtol=0, atol=1e-4)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = "Grüße, 速い 👍🏽 def f():"
        assert ours.tokenizer is not None
        assert tokenizer(text)["input_ids"] == ours.encode(text)
        assert tokenizer.decode(ours.encode(text)) == text
        assert tokenizer.eos_token_id == ours.tokenizer.eos_id


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_float_type_load_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    theirs = hf_model().to(dtype)
    theirs.save_pretrained(tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    expected = theirs.state_dict()
    for name, tensor in checkpoint.tensors.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name].float())


def test_a_bin_folder_of_hugging_face_is_read(tmp_path: Path) -> None:
    theirs = hf_model(tie_word_embeddings=False)
    theirs.config.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    checkpoint = load_checkpoint(tmp_path)
    ids = torch.arange(7)[None]
    with torch.no_grad():
        expected = theirs(ids).logits
        ours = MambaLM.from_tensors(checkpoint.config, checkpoint.tensors)(ids)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


class Payload:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, ("hacked",)


def test_a_bin_file_with_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_mamba_ssm(tmp_path / "m")
    for write in (
        lambda p: torch.save({"a": Payload()}, p),
        lambda p: p.write_bytes(pickle.dumps(Payload(), protocol=2)),
    ):
        write(tmp_path / "m" / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="damaged or holds more than tensors"):
            load_checkpoint(tmp_path / "m")
    assert not (tmp_path / "hacked").exists()


def test_a_run_folder_means_its_latest_checkpoint(tmp_path: Path) -> None:
    for step in (5, 40, 100):
        write_model(tmp_path / f"checkpoint-{step}", seed=step)
    (tmp_path / "checkpoint-900.tmp").mkdir()
    assert find_checkpoint(tmp_path).name == "checkpoint-100"
    assert find_checkpoint(tmp_path / "checkpoint-5").name == "checkpoint-5"


def damage(folder: Path, kind: str) -> None:  # noqa: C901 (a list of cases)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    match kind:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "header":
            weights.write_bytes(b"\xff" * 50)
        case "empty":
            weights.write_bytes(b"")
        case "no_weights":
            weights.unlink()
        case "shape":
            save_file(tensors | {"backbone.layers.1.mixer.D": torch.zeros(7)}, weights)
        case "missing":
            save_file({n: t for n, t in tensors.items() if n != "backbone.norm_f.weight"}, weights)
        case "unexpected":
            save_file(tensors | {"backbone.layers.0.mixer.dt_bias": torch.zeros(7)}, weights)
        case "config_key":
            raw = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(raw | {"n_heads": 8}))
        case "no_config":
            (folder / "config.json").unlink()
        case "generation_config":
            (folder / "generation_config.json").write_text('{"eos_token_id": "end"}')
        case "generation_json":
            (folder / "generation_config.json").write_text("[")
        case "tokenizer":
            (folder / "tokenizer.json").write_text("{}")
        case "tokenizer_config":
            (folder / "tokenizer_config.json").write_text('{"eos_token": 5}')
        case "big_tokenizer":
            trained_tokenizer(400).save(folder)
        case "index":
            weights.rename(folder / "x.safetensors")
            (folder / "model.safetensors.index.json").write_text('{"weight_map": 5}')
        case "traversal":
            weights.rename(folder.parent / "x.safetensors")
            index = {"weight_map": dict.fromkeys(tensors, "../x.safetensors")}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        case "absolute":
            weights.rename(folder.parent / "x.safetensors")
            index = {"weight_map": dict.fromkeys(tensors, str(folder.parent / "x.safetensors"))}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        case "shard_name":
            weights.unlink()
            (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 5}}')
        case "no_shard":
            weights.unlink()
            (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
        case "tied":
            raw = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("truncated", "model.safetensors is damaged or truncated"),
        ("header", "model.safetensors is damaged or truncated"),
        ("empty", "model.safetensors is damaged or truncated"),
        ("no_weights", "expected model.safetensors, .* found none"),
        ("shape", r"'backbone.layers.1.mixer.D': expected shape \(40,\), found \(7,\)"),
        ("missing", "'backbone.norm_f.weight' is missing"),
        ("unexpected", "unexpected tensor 'backbone.layers.0.mixer.dt_bias'"),
        ("config_key", "unknown key 'n_heads'"),
        ("no_config", "expected a config.json or checkpoint-STEP folders"),
        ("generation_config", "generation_config.json: eos_token_id must be an integer"),
        ("generation_json", "generation_config.json: expected a JSON object"),
        ("tokenizer", "tokenizer.json: expected a tokenizer.json"),
        ("tokenizer_config", "tokenizer_config.json: expected eos_token to be a string, found 5"),
        ("big_tokenizer", "tokenizer.json has 400 ids, the model's vocab_size is 300"),
        ("index", "expected a weight_map"),
        ("traversal", "leaves the folder"),
        ("absolute", "leaves the folder"),
        ("shard_name", "shard 5 leaves the folder|expected a weight_map"),
        ("no_shard", "b.safetensors is missing"),
        ("tied", "'lm_head.weight' differs from the embedding"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(model_folder: Path, kind: str, named: str) -> None:
    damage(model_folder, kind)
    with pytest.raises(YunminError, match=named) as caught:
        yunmin.load(model_folder)
    assert str(model_folder) in str(caught.value)
    assert "\n" not in str(caught.value).strip()


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("nowhere", "expected a checkpoint folder or a Hub id, found no such folder"),
        ("/no/such/folder", "found no such folder"),
        ("someone/some-mamba", "the Hugging Face Hub did not give it"),
        ("a/b..c--d", "the Hugging Face Hub did not give it"),
    ],
)
def test_a_source_that_is_not_there_is_refused(source: str, named: str) -> None:
    with pytest.raises(CheckpointError, match=named) as caught:
        load_checkpoint(source)
    assert source in str(caught.value)


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(CheckpointError, match="expected a folder, found a file"):
        load_checkpoint(tmp_path / "f")


def test_eos_comes_from_generation_config_then_config_then_tokenizer(tmp_path: Path) -> None:
    tokenizer = trained_tokenizer(290)
    plain = write_model(tmp_path / "a", tokenizer=tokenizer)
    assert load_checkpoint(plain).config.eos_token_ids == (tokenizer.eos_id,)
    assert load_checkpoint(plain).config.n_tokens == 290  # the tokenizer has no text for the rest
    named = write_model(tmp_path / "b", small_config(eos_token_ids=(7,)), tokenizer=tokenizer)
    assert load_checkpoint(named).config.eos_token_ids == (7,)
    write_json(named / "generation_config.json", {"eos_token_id": [8, 9]})
    assert load_checkpoint(named).config.eos_token_ids == (8, 9)
