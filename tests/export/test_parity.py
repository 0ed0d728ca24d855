"""The export's mathematics, in float64, against the model as it was trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from export.compact import Compact, compact_model, read_source
from export.wide import in_float64
from tests.export.fixtures import (
    ia3,
    lora,
    random_pillars,
    small_config,
    with_masks,
    write_adapter,
    write_source,
    write_trained_run,
)
from tests.models import random_tensors
from yunmin.checkpoint import load_checkpoint
from yunmin.model import MambaLM
from yunmin.pillars import Pillars, load_pillars
from yunmin.trained import build_trained, load_trained

IDS = torch.tensor([[5, 9, 250, 17, 3, 3, 88, 41, 120, 7, 299]])
CONFIGS = {
    "tied": small_config(),
    "untied": small_config(tied=False),
    "no-bias": small_config(bias=False),
    "widths-per-layer": small_config(uniform=False, tied=False),
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"lora": lora("in_proj", "x_proj", "dt_proj", "out_proj")},
    "embedding": {"lora": lora("embeddings", "x_proj", use_rslora=True)},
    "rslora": {"lora": lora("in_proj", "dt_proj", use_rslora=True)},
    "patterns": {
        "lora": lora("in_proj", "x_proj", rank_pattern={"x_proj": 2}, alpha_pattern={r"layers\.1\.mixer\.in_proj": 11})
    },
    "one-layer": {"lora": lora("in_proj", layers_to_transform=[1], layers_pattern="layers")},
    "regex": {"lora": lora("in_proj", target_modules=r".*\.0\.mixer\.(x|dt)_proj")},
    "ia3-outputs": {"ia3": ia3("in_proj", "x_proj", "dt_proj", "out_proj")},
    "ia3-inputs": {"ia3": ia3("in_proj", "x_proj", "dt_proj", inputs=("in_proj", "x_proj", "dt_proj"))},
    "both": {
        "lora": lora("in_proj", "dt_proj"),
        "ia3": ia3("x_proj", "out_proj", inputs=("out_proj",)),
    },
}


@torch.inference_mode()
def _logits(compact: Compact) -> Tensor:
    return torch.as_tensor(in_float64(MambaLM.from_tensors(compact.config, compact.tensors))(IDS))


@torch.inference_mode()
def _trained_logits(folder: Path) -> Tensor:
    model, _ = load_trained(folder)
    return torch.as_tensor(model.double()(IDS))


def _assert_equal(exported: Tensor, trained: Tensor) -> None:
    assert exported.dtype == trained.dtype == torch.float64
    assert float((exported - trained).abs().max()) <= 1e-12 * float(trained.abs().max())


# every kind of adapter on the most irregular model, and the mixture of both on every model
CASES = {name: ("widths-per-layer", name) for name in ADAPTERS} | {name: (name, "both") for name in CONFIGS}
CASES["embedding-tied-to-the-head"] = ("tied", "embedding")


@pytest.mark.parametrize(("shape", "kind"), CASES.values(), ids=CASES.keys())
def test_merged_folded_cut_and_ordered_model_equals_trained_one(tmp_path: Path, shape: str, kind: str) -> None:
    config, adapters = CONFIGS[shape], ADAPTERS[kind]
    write_source(tmp_path, config, pillars=random_pillars(config), adapters=adapters, tokenizer=False)
    compact = compact_model(read_source(tmp_path))
    assert compact.config.d_inner == tuple(inner - 8 for inner in config.d_inner)
    assert compact.config.d_state == tuple(n - 2 for n in config.d_state)
    _assert_equal(_logits(compact), _trained_logits(tmp_path))


@pytest.mark.parametrize(
    "adapters", [{}, {"ia3": ia3("in_proj", "out_proj", inputs=("out_proj",))}], ids=["alone", "beside ia3"]
)
def test_masks_act_on_the_base_weight_and_ia3_around_it(tmp_path: Path, adapters: dict[str, Any]) -> None:
    config = small_config()
    names = [
        "backbone.layers.0.mixer.in_proj.weight",
        "backbone.layers.1.mixer.out_proj.weight",
        "backbone.layers.1.mixer.dt_proj.weight",
    ]
    pillars = with_masks(random_pillars(config), random_tensors(config), *names)
    write_source(tmp_path, config, pillars=pillars, adapters=adapters, tokenizer=False)
    compact = compact_model(read_source(tmp_path))
    _assert_equal(_logits(compact), _trained_logits(tmp_path))
    zeros = int((compact.tensors[names[0]] == 0).sum())
    kept = compact.channels[0]
    assert zeros == int((~pillars.weight_masks[names[0]][torch.cat([kept, 32 + kept])]).sum()) > 0


def test_each_adapter_has_an_effect(tmp_path: Path) -> None:
    """Guards the comparison itself: an adapter that is silently inactive would make parity worthless."""
    config = small_config()
    folder = write_source(
        tmp_path / "base", config, adapters={"lora": lora("in_proj"), "ia3": ia3("out_proj")}, tokenizer=False
    )
    extra = write_adapter(tmp_path / "extra", config, lora("dt_proj"), seed=99)
    checkpoint = load_checkpoint(folder)
    pillars = Pillars.identity(config)
    folders = {"lora": folder / "adapters/lora", "ia3": folder / "adapters/ia3", "extra": extra}

    def logits(without: str) -> Tensor:
        chosen = {name: path for name, path in folders.items() if name != without}
        with torch.inference_mode():
            return torch.as_tensor(build_trained(checkpoint, pillars, chosen)(IDS))

    everything = logits(without="nothing")
    for name in folders:
        assert float((logits(without=name) - everything).abs().max()) > 1e-2, name


def test_external_adapters_are_merged_beside_the_checkpoints_own(tmp_path: Path) -> None:
    config = small_config()
    folder = write_source(
        tmp_path / "base", config, pillars=random_pillars(config), adapters={"lora": lora("in_proj")}, tokenizer=False
    )
    extra = [
        write_adapter(tmp_path / "more-lora", config, lora("dt_proj"), seed=21),
        write_adapter(tmp_path / "more-ia3", config, ia3("x_proj"), seed=22),
    ]
    checkpoint = load_checkpoint(folder)
    folders = {"lora": folder / "adapters/lora", "a": extra[0], "b": extra[1]}
    with torch.inference_mode():
        trained = build_trained(checkpoint, load_pillars(folder, config), folders).double()(IDS)
    _assert_equal(_logits(compact_model(read_source(folder, extra))), trained)


def test_adapted_embedding_unties_the_head_which_keeps_its_weights(tmp_path: Path) -> None:
    write_source(tmp_path, small_config(), adapters={"lora": lora("embeddings")}, tokenizer=False)
    compact = compact_model(read_source(tmp_path))
    embedding, head = compact.tensors["backbone.embeddings.weight"], compact.tensors["lm_head.weight"]
    assert not compact.config.tie_word_embeddings
    assert torch.equal(head, random_tensors(small_config())["backbone.embeddings.weight"].double())
    assert float((embedding - head).abs().max()) > 1e-2


def test_survivors_lie_in_scan_order(tmp_path: Path) -> None:
    config = small_config(uniform=False)
    pillars = random_pillars(config)
    folder = write_source(tmp_path, config, pillars=pillars, tokenizer=False)
    compact = compact_model(read_source(folder))
    tensors = random_tensors(config)
    for layer in range(config.n_layers):
        order, gate = pillars.scan_order[layer], pillars.channel_gates[layer]
        expected = [channel for channel in order.tolist() if gate[channel] != 0]
        assert compact.channels[layer].tolist() == expected
        name = f"backbone.layers.{layer}.mixer.conv1d.weight"
        assert torch.equal(compact.tensors[name], tensors[name][expected])


def test_only_zero_gates_cut(tmp_path: Path) -> None:
    config = small_config()
    tiny = tuple(torch.full((32,), 1e-20) for _ in range(2))
    folder = write_source(
        tmp_path, config, pillars=replace(Pillars.identity(config), channel_gates=tiny), tokenizer=False
    )
    assert compact_model(read_source(folder)).config == config


def test_plain_checkpoint_keeps_every_bit(tmp_path: Path) -> None:
    config = small_config()
    folder = write_source(tmp_path, config, tokenizer=False)
    compact = compact_model(read_source(folder)).cast(torch.float32)
    for name, tensor in random_tensors(config).items():
        assert torch.equal(compact.tensors[name], tensor), name


def test_stages_do_not_modify_their_input(tmp_path: Path) -> None:
    source = read_source(write_trained_run(tmp_path, small_config()))
    before = {name: tensor.clone() for name, tensor in source.checkpoint.tensors.items()}
    compact_model(source, torch.float32)
    assert all(torch.equal(before[name], tensor) for name, tensor in source.checkpoint.tensors.items())
