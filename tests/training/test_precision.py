"""Training with products in bfloat16 learns what training in float32 learns."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from tests.training.runs import interrupt_after, small_run
from training.config_file import parse_config
from training.run import resume, train
from yunmin.model import RMSNorm

_STEPS = {"max_steps": 8, "log_interval": 1}


def _losses(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def test_float32_is_the_default() -> None:
    assert parse_config({}).matmul_precision == "float32"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_products_have_the_configured_precision_and_norms_are_float32(precision: str, tmp_path: Path) -> None:
    products, norms = set(), set()

    def record(module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        if isinstance(module, nn.Linear) and module.training:
            products.add(output.dtype)
        elif isinstance(module, RMSNorm):
            norms.add(output.dtype)

    with register_module_forward_hook(record):
        train(small_run(tmp_path, matmul_precision=precision, enable_peft=False, max_steps=4))
    assert products == {getattr(torch, precision)}
    assert norms == {torch.float32}


def test_bfloat16_products_learn_as_float32_products_do(tmp_path: Path) -> None:
    runs = [
        train(small_run(tmp_path / precision, matmul_precision=precision, **_STEPS)).run
        for precision in ("float32", "bfloat16")
    ]
    wide, narrow = (_losses(run) for run in runs)
    assert len(wide) == len(narrow) == 8
    for exact, rounded in zip(wide, narrow, strict=True):
        assert rounded["cross_entropy"] == pytest.approx(exact["cross_entropy"], rel=0.02)
        assert math.isfinite(rounded["gradient_norm"])
    assert [n["cross_entropy"] for n in narrow] != [w["cross_entropy"] for w in wide]


@pytest.mark.parametrize("step", [9, 21])
def test_resuming_with_bfloat16_products_is_exact(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(small_run(tmp_path / "whole", matmul_precision="bfloat16"))
    with monkeypatch.context() as patch:
        interrupt_after(step, patch)
        stopped = train(small_run(tmp_path / "stopped", matmul_precision="bfloat16"))
    resumed = resume(stopped.run)
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = load_file(resumed.checkpoint / name), load_file(whole.checkpoint / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
