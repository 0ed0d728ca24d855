"""A batch in parts, and mixers computed twice: the same training, with less kept at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.models import random_ids, random_model, small_config
from tests.training.runs import small_run
from tests.training.test_resume import assert_same_checkpoint
from training.recompute import RecomputedMixer
from training.run import resume, train
from yunmin.errors import ConfigError
from yunmin.gated import GatedMixer


def _losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize("ranking", ["learned", "activation"])
def test_recomputing_changes_no_bit_and_a_batch_in_parts_only_rounding(ranking: str, tmp_path: Path) -> None:
    options = {"gate_ranking": ranking, "peft_dropout": 0.0}
    plain = train(small_run(tmp_path / "plain", **options))
    recomputed = train(small_run(tmp_path / "recomputed", **options, gradient_checkpointing=True))
    assert_same_checkpoint(recomputed.checkpoint, plain.checkpoint)
    in_parts = train(small_run(tmp_path / "parts", **options, gradient_accumulation=2))
    assert _losses(in_parts.run) == pytest.approx(_losses(plain.run), rel=1e-4)
    assert in_parts.validations == pytest.approx(plain.validations, rel=1e-4)
    assert (in_parts.checkpoint / "scan_order.npy").read_bytes() == (plain.checkpoint / "scan_order.npy").read_bytes()


def test_recomputing_keeps_less_between_forward_and_backward() -> None:
    kept = {}
    for mixer in (GatedMixer, RecomputedMixer):
        model = random_model(small_config(), mixer=mixer).train()
        own = {p.data_ptr() for p in model.parameters()}
        seen: dict[int, int] = {}

        def keep(tensor: Tensor, own: set[int] = own, seen: dict[int, int] = seen) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(random_ids(model.config, 4, 33)).square().mean()
        kept[mixer] = sum(seen.values())
        loss.backward()
    assert kept[RecomputedMixer] < 0.6 * kept[GatedMixer]


def test_how_a_run_computes_may_change_when_it_is_resumed(tmp_path: Path) -> None:
    run = train(small_run(tmp_path, max_steps=8)).run
    assert resume(run, ["gradient_accumulation=2", "gradient_checkpointing=true"]).steps == 8
    with pytest.raises(ConfigError, match="learning_rate: cannot change when a run is resumed"):
        resume(run, ["learning_rate=1"])
