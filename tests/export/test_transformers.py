"""The folders that others read and write: `transformers` and `peft` on their own Mamba.

One fact decides how adapters reload there: `transformers`' mixer reads `dt_proj.weight` raw, so an adapter on it has
no effect until it is merged, while ours calls the projection as a module.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from export.pipeline import export
from tests.export.fixtures import TEXT, ia3, lora, random_pillars, small_config, write_adapter, write_source
from yunmin.artifact import load_artifact
from yunmin.checkpoint import load_checkpoint
from yunmin.config import MambaConfig
from yunmin.model import MambaLM
from yunmin.pillars import Pillars
from yunmin.trained import build_trained

transformers = pytest.importorskip("transformers")
# two of peft 0.21's own habits: an attribute that transformers 5 deprecates, and a note about a second adapter
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
]
IDS = torch.tensor([[5, 9, 250, 17, 3, 3, 88, 41], [1, 2, 3, 4, 5, 6, 7, 8]])


@torch.inference_mode()
def _their_logits(model: Any) -> Tensor:
    return torch.as_tensor(model.eval()(IDS).logits)


@torch.inference_mode()
def _our_logits(folder: Path, adapters: dict[str, Path] | None = None) -> Tensor:
    checkpoint = load_checkpoint(folder)
    return torch.as_tensor(build_trained(checkpoint, Pillars.identity(checkpoint.config), adapters or {})(IDS))


def _assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert float((ours - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max())


def _theirs(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_source(tmp_path / "base", small_config(), tokenizer=False)


def test_their_untrained_checkpoint_is_exported_unchanged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=2, state_size=6, use_bias=True)
    model = transformers.MambaForCausalLM(config)
    model.save_pretrained(tmp_path / "source")
    manifest = export(tmp_path / "source", tmp_path / "out")
    assert manifest.before == manifest.after
    checkpoint, _ = load_artifact(tmp_path / "out")
    assert torch.equal(_their_logits(_theirs(tmp_path / "out")), _their_logits(model))
    with torch.inference_mode():
        _assert_same(
            torch.as_tensor(MambaLM.from_tensors(checkpoint.config, checkpoint.tensors)(IDS)), _their_logits(model)
        )


@pytest.mark.parametrize("tied", [True, False])
def test_uniform_artifact_loads_in_transformers_with_the_same_logits(tmp_path: Path, tied: bool) -> None:
    config = small_config(tied=tied)
    adapters = {"lora": lora("in_proj", "dt_proj"), "ia3": ia3("x_proj", "out_proj", inputs=("out_proj",))}
    write_source(tmp_path / "source", config, pillars=random_pillars(config), adapters=adapters)
    export(tmp_path / "source", tmp_path / "out")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    _assert_same(_our_logits(tmp_path / "out"), _their_logits(model))

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = load_artifact(tmp_path / "out")[0].tokenizer
    assert ours is not None
    assert tokenizer(TEXT[:200])["input_ids"] == ours.encode(TEXT[:200])
    assert tokenizer.decode(ours.encode(TEXT[:200])) == TEXT[:200]


def test_artifact_with_widths_per_layer_is_refused_by_transformers(tmp_path: Path) -> None:
    write_source(tmp_path / "source", small_config(uniform=False), tokenizer=False)
    export(tmp_path / "source", tmp_path / "out")
    with pytest.raises(Exception, match="expected int, got list"):
        _theirs(tmp_path / "out")


def test_adapters_load_side_by_side_onto_transformers_model_with_the_same_logits(base: Path, tmp_path: Path) -> None:
    config = small_config()
    folders = {
        "lora": write_adapter(tmp_path / "lora", config, lora("in_proj")),
        "ia3": write_adapter(tmp_path / "ia3", config, ia3("x_proj", "out_proj", inputs=("out_proj",))),
    }
    model = _theirs(base)
    for name, folder in folders.items():
        model.load_adapter(str(folder), adapter_name=name)
    _assert_same(_our_logits(base, folders), _their_logits(model))
    export(base, tmp_path / "out", adapters=list(folders.values()))
    _assert_same(_our_logits(tmp_path / "out"), _their_logits(model))


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_adapter_on_dt_proj_acts_in_transformers_only_when_merged(base: Path, tmp_path: Path, kind: str) -> None:
    from peft import PeftModel

    config = small_config()
    folder = write_adapter(tmp_path / kind, config, {"lora": lora, "ia3": ia3}[kind]("dt_proj"))
    plain, ours = _their_logits(_theirs(base)), _our_logits(base, {kind: folder})
    assert float((ours - plain).abs().max()) > 1e-2 * float(plain.abs().max())

    unmerged = PeftModel.from_pretrained(_theirs(base), str(folder))
    _assert_same(_their_logits(unmerged), plain)  # silently without effect
    _assert_same(ours, _their_logits(unmerged.merge_and_unload()))


def test_merging_one_after_the_other_equals_our_export(base: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    config = small_config()
    folders = [
        write_adapter(tmp_path / "lora", config, lora("in_proj", "dt_proj", use_rslora=True)),
        write_adapter(tmp_path / "ia3", config, ia3("x_proj", "out_proj", inputs=("x_proj",))),
    ]
    model = _theirs(base)
    for folder in folders:
        model = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    export(base, tmp_path / "out", adapters=folders)
    _assert_same(_our_logits(tmp_path / "out"), _their_logits(model))
    theirs = model.state_dict()
    for name, tensor in load_artifact(tmp_path / "out")[0].tensors.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6, msg=name)


def test_adapter_saved_by_peft_on_transformers_model_is_exported(base: Path, tmp_path: Path) -> None:
    from peft import get_peft_model

    model = get_peft_model(_theirs(base), lora("in_proj", "x_proj", init_lora_weights=False, task_type="CAUSAL_LM"))
    model.save_pretrained(str(tmp_path / "adapter"))
    manifest = export(base, tmp_path / "out", adapters=[tmp_path / "adapter"])
    assert manifest.provenance["adapters"][0]["projections"] == ["in_proj", "x_proj"]
    _assert_same(_our_logits(tmp_path / "out"), _their_logits(model))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_adapter_of_the_tied_embedding_is_exported_as_it_acts_unmerged(base: Path, tmp_path: Path) -> None:
    """The targets that Mamba's model cards on the Hub suggest; peft's own merge would change the head, too."""
    from peft import get_peft_model

    model = get_peft_model(_theirs(base), lora("embeddings", "in_proj", init_lora_weights=False))
    model.save_pretrained(str(tmp_path / "adapter"))
    manifest = export(base, tmp_path / "out", adapters=[tmp_path / "adapter"])
    assert manifest.after["parameters"] == manifest.before["parameters"] + 300 * 16
    assert "tied to it before, has its own weights." in (tmp_path / "out/README.md").read_text()
    unmerged = _their_logits(model)
    _assert_same(_our_logits(tmp_path / "out"), unmerged)
    _assert_same(_their_logits(_theirs(tmp_path / "out")), unmerged)


def test_config_of_an_artifact_names_its_own_widths(tmp_path: Path) -> None:
    config = small_config()
    write_source(tmp_path / "source", config, pillars=random_pillars(config), tokenizer=False)
    export(tmp_path / "source", tmp_path / "out")
    raw = json.loads((tmp_path / "out/config.json").read_text())
    assert (raw["intermediate_size"], raw["state_size"], raw["time_step_rank"]) == (24, 4, 3)
    assert isinstance(raw["expand"], int)
    assert MambaConfig.from_file(tmp_path / "out/config.json").d_inner == (24, 24)
