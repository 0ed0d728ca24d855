"""What cannot be merged exactly is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.adapter import Adapter, Ia3Update, LoraUpdate, read_adapter, refuse_other_base, refuse_overlaps
from tests.export.fixtures import ia3, lora, small_config, write_adapter
from tests.models import random_tensors
from yunmin.errors import CheckpointError

IN_PROJ = "base_model.model.backbone.layers.0.mixer.in_proj"
Tensors = dict[str, torch.Tensor]


def _edit_options(folder: Path, **options: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


def _edit_tensors(folder: Path, edit: Callable[[Tensors], Tensors]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(edit(load_file(path)), path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"modules_to_save": ["norm_f"]}, r"modules_to_save is \['norm_f'\]"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying is True"),
        ({"an_option_of_the_future": 1}, "an_option_of_the_future is 1"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base"),
        ({"peft_type": "VERA"}, "peft_type must be 'LORA' or 'IA3' to be merged exactly, found 'VERA'"),
        ({"r": 0}, "rank of .* must be a positive integer, found 0"),
        ({"lora_alpha": "5"}, "lora_alpha of .* must be a number, found '5'"),
        ({"r": 4}, r"lora_A of .*: expected shape \(4, 16\), found \(3, 16\)"),
    ],
    ids=str,
)
def test_option_that_cannot_be_merged_is_refused_by_name(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    folder = write_adapter(tmp_path, small_config(), lora("in_proj"))
    _edit_options(folder, **options)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(folder, small_config())


def _without_b(tensors: Tensors) -> Tensors:
    return {name: t for name, t in tensors.items() if name != f"{IN_PROJ}.lora_B.weight"}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_without_b, r"lora_B of backbone.layers.0.mixer.in_proj: expected shape \(64, 3\), found nothing"),
        (lambda t: {**t, f"{IN_PROJ}.lora_magnitude_vector": torch.ones(64)}, "unexpected tensor .*magnitude"),
        (lambda t: {**t, f"{IN_PROJ}.ia3_l": torch.ones(64, 1)}, "unexpected tensor .*ia3_l"),
        (lambda t: {**t, f"{IN_PROJ}.lora_B.weight": torch.ones(62, 3)}, r"expected shape \(64, 3\), found \(62, 3\)"),
        (
            lambda t: {n.replace("layers.1", "layers.7"): v for n, v in t.items()},
            "adapts 'backbone.layers.7.mixer.in_proj'",
        ),
        (lambda t: {**t, "base_model.model.lm_head.lora_A.weight": torch.ones(3, 16)}, "adapts 'lm_head'"),
        (lambda _: {}, "holds no tensors"),
    ],
    ids=["missing", "dora", "ia3", "shape", "layer", "head", "empty"],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, edit: Callable[[Tensors], Tensors], message: str
) -> None:
    folder = write_adapter(tmp_path, small_config(), lora("in_proj"))
    _edit_tensors(folder, edit)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(folder, small_config())


def test_ia3_vector_of_the_wrong_side_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, small_config(), ia3("in_proj"))
    _edit_options(folder, feedforward_modules=["in_proj"])
    with pytest.raises(CheckpointError, match=r"ia3_l of .*: expected shape \(1, 16\), found \(64, 1\)"):
        read_adapter(folder, small_config())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_config.json", None, "expected an adapter folder with adapter_config.json, found none"),
        ("adapter_config.json", b"{", "expected JSON"),
        ("adapter_config.json", b"[]", "expected a JSON object, found list"),
        ("adapter_model.safetensors", None, "expected adapter_model.safetensors, found no such file"),
        ("adapter_model.safetensors", b"\x10\0\0\0\0\0\0\0{", "damaged or truncated"),
    ],
)
def test_damaged_folder_is_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    folder = write_adapter(tmp_path, small_config(), lora("in_proj"))
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(folder, small_config())


def test_embedding_of_another_base_is_refused(tmp_path: Path) -> None:
    config = small_config()
    folder = write_adapter(tmp_path, config, lora("embeddings"))
    base = random_tensors(config)
    name = "base_model.model.backbone.embeddings.base_layer.weight"
    _edit_tensors(folder, lambda tensors: {**tensors, name: base["backbone.embeddings.weight"].clone()})
    adapter = read_adapter(folder, config)
    assert list(adapter.updates) == ["backbone.embeddings"]
    refuse_other_base(adapter, base)
    with pytest.raises(CheckpointError, match="brings a base embedding that differs from this model's"):
        refuse_other_base(adapter, random_tensors(config, seed=5))


def test_two_adapters_of_one_module_are_refused(tmp_path: Path) -> None:
    config = small_config()
    first = read_adapter(write_adapter(tmp_path / "a", config, lora("in_proj", "x_proj")), config)
    second = read_adapter(write_adapter(tmp_path / "b", config, ia3("x_proj")), config)
    with pytest.raises(CheckpointError, match=r"b: adapts backbone.layers.0.mixer.x_proj, as does .*a; merge one"):
        refuse_overlaps([first, second], [])


def test_lora_on_a_masked_projection_is_refused_and_ia3_is_not(tmp_path: Path) -> None:
    name = "backbone.layers.1.mixer.in_proj"
    config = small_config()
    with pytest.raises(CheckpointError, match=f"LoRA on {name}, whose weight has a mask"):
        refuse_overlaps(
            [read_adapter(write_adapter(tmp_path / "a", config, lora("in_proj")), config)], [f"{name}.weight"]
        )
    refuse_overlaps([read_adapter(write_adapter(tmp_path / "b", config, ia3("in_proj")), config)], [f"{name}.weight"])


def test_patterns_choose_rank_and_alpha_by_the_end_of_the_name(tmp_path: Path) -> None:
    config = small_config()
    patterns = lora("in_proj", "x_proj", rank_pattern={"x_proj": 2}, alpha_pattern={r"1\.mixer\.in_proj": 12})
    adapter = read_adapter(write_adapter(tmp_path, config, patterns), config)
    assert _scale(adapter, "backbone.layers.0.mixer.in_proj") == pytest.approx(5 / 3)
    assert _scale(adapter, "backbone.layers.1.mixer.in_proj") == 4
    assert _scale(adapter, "backbone.layers.1.mixer.x_proj") == 2.5


def test_rslora_scales_by_the_root_of_the_rank(tmp_path: Path) -> None:
    config = small_config()
    adapter = read_adapter(write_adapter(tmp_path, config, lora("in_proj", r=4, use_rslora=True)), config)
    assert _scale(adapter, "backbone.layers.0.mixer.in_proj") == 2.5


def test_feedforward_modules_say_which_side_ia3_scales(tmp_path: Path) -> None:
    config = small_config()
    adapter = read_adapter(write_adapter(tmp_path, config, ia3("x_proj", "out_proj", inputs=("out_proj",))), config)
    sides = {module: update.on_inputs for module, update in adapter.updates.items() if isinstance(update, Ia3Update)}
    assert sides["backbone.layers.0.mixer.out_proj"] is True
    assert sides["backbone.layers.0.mixer.x_proj"] is False


def _scale(adapter: Adapter, module: str) -> float:
    update = adapter.updates[module]
    assert isinstance(update, LoraUpdate)
    return update.scale
