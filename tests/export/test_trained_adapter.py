"""Adapters that `peft` has trained on `transformers`' own Mamba: read as saved, merged, and computing the same."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from export.cli import main
from tests.export.fixtures import ia3, lora, small_config, write_source
from tests.models import random_ids
from yunmin.artifact import load_artifact
from yunmin.cli import run
from yunmin.model import MambaLM

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]
IDS = random_ids(small_config(), 2, 9, seed=5)
STEPS = 4


def train_adapter(base: Path, folder: Path, adapter: Any) -> Any:
    """A few steps on one batch, as a user would train; saves the adapter and gives back their model."""
    torch.manual_seed(0)  # peft draws A from the global generator
    model = peft.get_peft_model(transformers.MambaForCausalLM.from_pretrained(base), copy.copy(adapter))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    ids = random_ids(small_config(), 4, 8)
    losses = []
    for _ in range(STEPS):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    model.save_pretrained(str(folder))
    return model.eval()


def exported_logits(base: Path, adapter: Path, out: Path) -> Tensor:
    assert run(main, [str(base), str(out), "--adapter", str(adapter)]) == 0
    artifact, _ = load_artifact(out)
    with torch.inference_mode():
        return torch.as_tensor(MambaLM.from_tensors(artifact.config, artifact.tensors)(IDS))


@torch.inference_mode()
def logits_of(model: Any) -> Tensor:
    return torch.as_tensor(model.eval()(IDS).logits)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert float((ours - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max())


ADAPTERS = {
    "lora": lora("in_proj", "x_proj", "dt_proj", task_type="CAUSAL_LM", lora_dropout=0.1),
    "lora of a pattern": lora(
        "in_proj", "x_proj", rank_pattern={"x_proj": 2}, use_rslora=True, layers_to_transform=[1]
    ),
    "ia3": ia3("in_proj", "x_proj", "out_proj", inputs=("out_proj",), task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("tied", [True, False])
def test_trained_adapter_is_exported_as_peft_applies_and_merges_it(tmp_path: Path, name: str, tied: bool) -> None:
    base = write_source(tmp_path / "base", small_config(tied=tied), tokenizer=False)
    model = train_adapter(base, tmp_path / "adapter", ADAPTERS[name])
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert all(key.startswith("base_model.model.backbone.layers.") for key in saved)
    ours = exported_logits(base, tmp_path / "adapter", tmp_path / "out")
    plain = logits_of(transformers.MambaForCausalLM.from_pretrained(base))
    assert float((ours - plain).abs().max()) > 1e-2 * float(plain.abs().max())  # training has moved something
    assert_same(ours, logits_of(model))
    merged = model.merge_and_unload()
    assert_same(ours, logits_of(merged))
    weights = merged.state_dict()
    for key, tensor in load_artifact(tmp_path / "out")[0].tensors.items():
        torch.testing.assert_close(tensor, weights[key], rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("tied", [True, False])
def test_trained_adapter_of_the_embedding_is_exported_as_peft_applies_it(tmp_path: Path, tied: bool) -> None:
    """Unmerged it leaves a tied head alone, which is what was trained; peft's own merge would change the head, too."""
    base = write_source(tmp_path / "base", small_config(tied=tied), tokenizer=False)
    model = train_adapter(base, tmp_path / "adapter", lora("embeddings", "in_proj", "x_proj", task_type="CAUSAL_LM"))
    ours = exported_logits(base, tmp_path / "adapter", tmp_path / "out")
    assert_same(ours, logits_of(model))
    if not tied:
        assert_same(ours, logits_of(model.merge_and_unload()))


def test_adapter_on_dt_proj_has_learned_nothing_there_and_merges_to_nothing(tmp_path: Path) -> None:
    """transformers' mixer reads the weight of `dt_proj` past the adapter, so no gradient arrives."""
    base = write_source(tmp_path / "base", small_config(), tokenizer=False)
    train_adapter(base, tmp_path / "adapter", ADAPTERS["lora"])
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    learned = {key: float(tensor.abs().max()) for key, tensor in saved.items() if "lora_B" in key}
    assert all((value == 0) == ("dt_proj" in key) for key, value in learned.items())
    exported_logits(base, tmp_path / "adapter", tmp_path / "out")
    name = "backbone.layers.1.mixer.dt_proj.weight"
    assert torch.equal(load_artifact(tmp_path / "out")[0].tensors[name], load_file(base / "model.safetensors")[name])


def test_adapter_trained_on_the_headless_model_is_refused_by_the_name_of_its_module(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_source(tmp_path / "base", small_config(), tokenizer=False)
    model = peft.get_peft_model(transformers.MambaModel.from_pretrained(base), lora("in_proj"))
    model.save_pretrained(str(tmp_path / "adapter"))
    assert run(main, [str(base), str(tmp_path / "out"), "--adapter", str(tmp_path / "adapter")]) == 1
    assert "adapts 'layers.0.mixer.in_proj'" in capsys.readouterr().err
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["peft_type"] == "LORA"
