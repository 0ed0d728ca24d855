"""Quantized checkpoint folders: aligned, mapped, checked, and refused by who cannot read them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import yunmin
from tests.models import random_tensors
from tests.quantization.fixtures import CONFIGS, quantized_checkpoint, write_quantized
from yunmin.axes import expected_shapes
from yunmin.checkpoint import load_checkpoint
from yunmin.errors import CheckpointError, ConfigError
from yunmin.files import write_aligned_safetensors
from yunmin.quantization.layout import Format, Quantization, stored_bytes, stored_tensors

IN_PROJ = "backbone.layers.0.mixer.in_proj.weight"
FORMATS: list[Format] = ["int8", "int4"]


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data begins, and the header."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return 8 + size, json.loads(file.read(size))


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("which", CONFIGS)
def test_quantized_tensors_begin_at_multiples_of_64_bytes(tmp_path: Path, which: str, weight_format: Format) -> None:
    config, quantized = CONFIGS[which], Quantization(weight_format)
    path = write_quantized(tmp_path, config, weight_format) / "model.safetensors"
    data, header = _header(path)
    header.pop("__metadata__")
    for name, entry in header.items():
        offset = data + entry["data_offsets"][0]
        assert offset % (64 if name.endswith((".int8", ".int4")) else 2 if entry["dtype"] == "F16" else 4) == 0, name
    assert path.stat().st_size == data + stored_bytes(config, quantized)
    assert set(header) == set(stored_tensors(config, quantized))


@pytest.mark.parametrize("weight_format", FORMATS)
def test_the_file_is_mapped_not_copied(tmp_path: Path, weight_format: Format) -> None:
    tensors = quantized_checkpoint(tmp_path, CONFIGS["untied"], weight_format).tensors
    data, header = _header(tmp_path / "model.safetensors")
    starts = {t.data_ptr() - header[name]["data_offsets"][0] for name, t in tensors.items()}
    assert len(starts) == 1  # all in one mapping, at the file's own distances
    assert starts.pop() % 64 == 0
    assert data % 64 == 0
    assert all(t.data_ptr() % 64 == 0 for name, t in tensors.items() if name.endswith((".int8", ".int4")))
    assert "model.safetensors" in Path("/proc/self/maps").read_text() if Path("/proc/self/maps").exists() else True


def test_which_tensors_are_quantized_how() -> None:
    config = CONFIGS["untied"]
    for weight_format in FORMATS:
        formats = {name: Quantization(weight_format).of(name) for name in expected_shapes(config)}
        for name, found in formats.items():
            if name.endswith(("in_proj.weight", "x_proj.weight", "out_proj.weight")):
                assert found == weight_format, name
            elif name.endswith(("dt_proj.weight", "embeddings.weight", "lm_head.weight")):
                assert found == "int8", name
            else:
                assert found is None, name


@pytest.mark.parametrize("weight_format", FORMATS)
def test_what_is_not_quantized_is_stored_as_it_was(tmp_path: Path, weight_format: Format) -> None:
    config = CONFIGS["cut"]
    found = quantized_checkpoint(tmp_path, config, weight_format)
    assert found.quantization == Quantization(weight_format)
    for name, tensor in random_tensors(config).items():
        if Quantization(weight_format).of(name) is None:
            assert torch.equal(found.tensors[name], tensor), name
        else:
            assert name not in found.tensors


@pytest.mark.parametrize("sizes", [[], [0], [1], [64, 3, 128, 2, 0, 63], list(range(70))], ids=str)
def test_aligned_files_are_valid_and_hold_what_was_written(tmp_path: Path, sizes: list[int]) -> None:
    tensors = {f"t{i}é": torch.arange(size).to(torch.uint8) for i, size in enumerate(sizes)}
    tensors |= {f"f{i}": torch.full((3, size), 0.5, dtype=torch.float16) for i, size in enumerate(sizes)}
    write_aligned_safetensors(tmp_path / "a.safetensors", tensors)
    found = load_file(tmp_path / "a.safetensors")
    assert set(found) == set(tensors)
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


Tensors = dict[str, Tensor]


def _without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_without(f"{IN_PROJ}.int4"), rf"tensor '{IN_PROJ}.int4' is missing, expected shape \(6, 1, 4, 16, 4\)"),
        (_without(f"{IN_PROJ}.scale"), rf"tensor '{IN_PROJ}.scale' is missing"),
        (_without("backbone.layers.1.mixer.D"), r"tensor 'backbone.layers.1.mixer.D' is missing"),
        (
            lambda t: {**t, f"{IN_PROJ}.int4": t[f"{IN_PROJ}.int4"][1:].clone()},
            rf"tensor '{IN_PROJ}.int4': expected shape \(6, 1, 4, 16, 4\), found \(5, 1, 4, 16, 4\)",
        ),
        (
            lambda t: {**t, f"{IN_PROJ}.scale": t[f"{IN_PROJ}.scale"].float()},
            rf"tensor '{IN_PROJ}.scale': expected torch.float16, found torch.float32",
        ),
        (lambda t: {**t, f"{IN_PROJ}.int8": torch.zeros(3)}, rf"unexpected tensor '{IN_PROJ}.int8'"),
        (lambda t: {**t, IN_PROJ: torch.zeros(3)}, rf"unexpected tensor '{IN_PROJ}'"),
    ],
    ids=["packed", "scale", "plain", "shape", "dtype", "other-format", "float"],
)
def test_packed_tensors_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, edit: Callable[[Tensors], Tensors], message: str
) -> None:
    folder = write_quantized(tmp_path, CONFIGS["untied"], "int4")
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    write_aligned_safetensors(folder / "model.safetensors", edit(tensors))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder, quantized=True)


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    path = write_quantized(tmp_path, CONFIGS["untied"], "int8") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or truncated"):
        load_checkpoint(tmp_path, quantized=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quantization_config.quant_method must be 'yunmin', got 'bitsandbytes'"),
        ({"format": "int3"}, "quantization_config.format must be one of int8, int4, got 'int3'"),
        ({"group_size": 64}, "quantization_config.group_size must be 32, got 64"),
    ],
    ids=str,
)
def test_other_quantizations_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = write_quantized(tmp_path, CONFIGS["untied"], "int8") / "config.json"
    raw = json.loads(path.read_text())
    raw["quantization_config"] |= options
    path.write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=message):
        load_checkpoint(tmp_path, quantized=True)


def test_readers_of_float32_refuse_a_quantized_checkpoint(tmp_path: Path) -> None:
    folder = write_quantized(tmp_path, CONFIGS["untied"], "int8")
    with pytest.raises(CheckpointError, match=r"expected float32 weights, found int8 ones; use the run or checkpoint"):
        load_checkpoint(folder)
    with pytest.raises(CheckpointError, match="expected float32 weights, found int8 ones"):
        yunmin.load(folder)  # a folder with a manifest is an artifact, and read as one


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("weight_format", FORMATS)
def test_transformers_refuses_a_quantized_checkpoint(tmp_path: Path, weight_format: Format) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_quantized(tmp_path, CONFIGS["tied"], weight_format)
    with pytest.raises(Exception, match=r"'intermediate_size'|'state_size'"):
        AutoModelForCausalLM.from_pretrained(folder)
