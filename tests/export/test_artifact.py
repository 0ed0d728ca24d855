"""Whole exports: what is in the folder, and that it appears whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import yunmin
from export import compact, write
from export.fold import fold_gates
from export.pipeline import export
from tests.export.fixtures import (
    TEXT,
    ia3,
    lora,
    random_pillars,
    small_config,
    write_adapter,
    write_source,
    write_trained_run,
)
from tests.models import random_tensors
from yunmin.artifact import load_artifact
from yunmin.checkpoint import write_checkpoint
from yunmin.config import MambaConfig
from yunmin.cost import cost_of
from yunmin.errors import ArtifactError, CheckpointError, VerificationError
from yunmin.files import sha256_file
from yunmin.quantization.layout import Quantization


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trained_run(tmp_path_factory.mktemp("run"), small_config())


@pytest.fixture(scope="module")
def artifact(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifacts") / "artifact"
    export(run_folder, out)
    return out


def test_artifact_holds_everything_and_generates(artifact: Path) -> None:
    names = "README.md config.json generation_config.json manifest.json model.safetensors scan_order.npy"
    names += " scan_order_inv.npy tokenizer.json tokenizer_config.json"
    assert sorted(path.name for path in artifact.iterdir()) == sorted(names.split())
    completion = yunmin.load(artifact, device="cpu").generate("the quick", max_tokens=5, temperature=0)
    assert len(completion.token_ids) == 5


def test_artifact_generates_what_the_run_generates(artifact: Path, run_folder: Path) -> None:
    prompt = TEXT[:40]
    texts = [
        yunmin.load(folder, device="cpu").generate(prompt, max_tokens=12, temperature=0).token_ids
        for folder in (artifact, run_folder)
    ]
    assert texts[0] == texts[1]


def test_manifest_tells_sizes_cuts_and_where_it_came_from(artifact: Path, run_folder: Path) -> None:
    checkpoint, manifest = load_artifact(artifact)
    assert manifest.before == cost_of(small_config()).to_dict()
    assert manifest.after == cost_of(checkpoint.config).to_dict()
    cut = {"d_inner_before": 32, "d_inner_after": 24, "d_state_before": 6, "d_state_after": 4}
    assert manifest.cuts == [cut, cut]
    facts = manifest.provenance
    assert facts["source"] == str(run_folder)
    assert facts["checkpoint"] == "checkpoint-20"
    weights = run_folder / "checkpoint-20" / "model.safetensors"
    assert facts["source_files"]["model.safetensors"] == sha256_file(weights)
    assert "pillars.safetensors" in facts["source_files"]
    assert [(a["path"], a["kind"], a["modules"]) for a in facts["adapters"]] == [
        ("adapters/lora", "LORA", 4),
        ("adapters/ia3", "IA3", 4),
    ]
    assert facts["gates"] == {"zero": 20, "one": 0, "other": 56}
    assert facts["reordered_layers"] == 2
    assert {name: parity.tolerance for name, parity in manifest.parity.items()} == {
        "float64": 1e-10,
        "float32": 1e-4,
        "stepwise": 1e-4,
    }
    assert all(parity.holds and parity.tokens > 20 for parity in manifest.parity.values())


def test_scan_order_names_the_starting_channels_and_their_new_places(artifact: Path) -> None:
    order, inverse = np.load(artifact / "scan_order.npy"), np.load(artifact / "scan_order_inv.npy")
    pillars = random_pillars(small_config())
    assert order.shape == (2, 24)
    assert inverse.shape == (2, 32)
    for layer in range(2):
        survivors = [c for c in pillars.scan_order[layer].tolist() if pillars.channel_gates[layer][c] != 0]
        assert order[layer].tolist() == survivors
        assert inverse[layer][order[layer]].tolist() == list(range(24))
        assert sorted(np.flatnonzero(inverse[layer] == -1)) == sorted(set(range(32)) - set(survivors))


def test_same_input_gives_the_same_bytes(artifact: Path, run_folder: Path, tmp_path: Path) -> None:
    export(run_folder, tmp_path / "artifact")
    for name in ("model.safetensors", "config.json", "scan_order.npy", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "artifact" / name).read_bytes() == (artifact / name).read_bytes()


def test_card_says_what_it_is_and_how_to_load_it(artifact: Path) -> None:
    card = (artifact / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "Every layer has 24 inner channels. Every layer has 4 states per channel." in card
    assert "LORA on dt_proj and in_proj" in card
    assert "AutoModelForCausalLM" in card
    assert "license:" not in card.partition("\n---\n")[0]


def test_artifact_can_be_exported_again_with_another_adapter(artifact: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", load_artifact(artifact)[0].config, lora("in_proj"))
    manifest = export(artifact, tmp_path / "second", adapters=[adapter])
    assert [a["path"] for a in manifest.provenance["adapters"]] == [str(adapter)]
    first, second = (load_artifact(folder)[0].tensors for folder in (artifact, tmp_path / "second"))
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed == {f"backbone.layers.{i}.mixer.in_proj.weight" for i in range(2)}


def test_damaged_artifact_is_no_source(artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path / "damaged")
    data = bytearray((tmp_path / "damaged/model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "damaged/model.safetensors").write_bytes(data)
    with pytest.raises(ArtifactError, match="wrong hash"):
        export(tmp_path / "damaged", tmp_path / "out")


def test_latest_checkpoint_of_a_run_is_exported(tmp_path: Path) -> None:
    config = small_config()
    for step in (5, 10, 9):
        write_source(tmp_path / f"run/checkpoint-{step}", config, seed=step)
    assert export(tmp_path / "run", tmp_path / "out").provenance["checkpoint"] == "checkpoint-10"
    assert torch.equal(load_artifact(tmp_path / "out")[0].tensors["backbone.norm_f.weight"],
                       random_tensors(config, 10)["backbone.norm_f.weight"])  # fmt: skip


def test_mamba_ssm_folder_is_exported(tmp_path: Path) -> None:
    source = tmp_path / "ssm"
    source.mkdir()
    raw = {"d_model": 16, "n_layer": 2, "vocab_size": 250, "ssm_cfg": {"d_state": 6}, "pad_vocab_size_multiple": 8}
    (source / "config.json").write_text(json.dumps(raw))
    config = MambaConfig.from_dict(raw)
    tensors = {n.replace("embeddings", "embedding"): t for n, t in random_tensors(config).items()}
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    torch.save(tensors, source / "pytorch_model.bin")
    manifest = export(source, tmp_path / "out")
    written, _ = load_artifact(tmp_path / "out")
    assert (written.config.vocab_size, written.config.n_tokens) == (256, 250)
    assert list(manifest.provenance["source_files"]) == ["config.json", "pytorch_model.bin"]
    assert "random token ids" in manifest.provenance["verified_on"]


def test_widths_per_layer_export_and_load(tmp_path: Path) -> None:
    config = small_config(uniform=False)
    adapters = {"ia3": ia3("in_proj", "dt_proj")}
    write_source(tmp_path / "source", config, pillars=random_pillars(config), adapters=adapters)
    export(tmp_path / "source", tmp_path / "out")
    model = yunmin.load(tmp_path / "out", device="cpu")
    assert model.config.d_inner == (24, 12)
    assert model.config.d_state == (4, 7)
    assert model.generate("the quick", max_tokens=3, temperature=0).token_ids
    assert (tmp_path / "out/README.md").read_text().startswith("---\nlibrary_name: yunmin\n")


# --- whole or not at all


def test_existing_destination_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ArtifactError, match="out: exists already; --force replaces an artifact"):
        export(tmp_path / "no-such-source", tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="expected a folder to write, found a file"):
        export(tmp_path / "no-such-source", tmp_path / "file", force=True)
    with pytest.raises(ArtifactError, match="is a file"):
        export(tmp_path / "no-such-source", tmp_path / "file/out")


def test_force_replaces_an_artifact_but_nothing_else(artifact: Path, run_folder: Path, tmp_path: Path) -> None:
    write_source(tmp_path / "source", small_config())
    with pytest.raises(ArtifactError, match="holds other files and no artifact"):
        export(run_folder, tmp_path / "source", force=True)
    export(tmp_path / "source", tmp_path / "out")
    export(run_folder, tmp_path / "out", force=True)
    assert sha256_file(tmp_path / "out/model.safetensors") == sha256_file(artifact / "model.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def _spoiled(tensors: dict[str, torch.Tensor], amount: float) -> dict[str, torch.Tensor]:
    name = "backbone.layers.1.mixer.D"
    return {**tensors, name: tensors[name] + amount}


def test_wrong_mathematics_is_noticed_in_float64_and_not_written(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong_fold(*arguments: Any) -> tuple[MambaConfig, dict[str, torch.Tensor]]:
        config, tensors = fold_gates(*arguments)
        return config, _spoiled(tensors, 1e-7)  # far below what float32 could tell

    monkeypatch.setattr(compact, "fold_gates", wrong_fold)
    with pytest.raises(VerificationError, match=r"^float64: the exported model's logits differ"):
        export(run_folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_wrong_file_is_noticed_in_float32_and_leaves_the_old_artifact(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong_write(
        folder: Path, config: MambaConfig, tensors: dict[str, torch.Tensor], quantization: Quantization
    ) -> None:
        write_checkpoint(folder, config, _spoiled(tensors, 0.1), quantization)

    export(run_folder, tmp_path / "out")
    before = sha256_file(tmp_path / "out/manifest.json")
    monkeypatch.setattr(write, "write_checkpoint", wrong_write)
    with pytest.raises(VerificationError, match=r"^float32: .*in float64 both agree, and the trained model's own"):
        export(run_folder, tmp_path / "out", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sha256_file(tmp_path / "out/manifest.json") == before


def test_full_disk_is_one_clear_error(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write, "write_checkpoint", full)
    with pytest.raises(ArtifactError, match="out: cannot be written: No space left on device"):
        export(run_folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_layer_without_channels_is_refused(tmp_path: Path) -> None:
    config = small_config()
    write_source(tmp_path / "source", config, pillars=random_pillars(config, channel_zeros=32))
    with pytest.raises(CheckpointError, match="layer 0: all 32 inner channels are gated off"):
        export(tmp_path / "source", tmp_path / "out")


def test_killed_export_leaves_no_half_artifact(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", small_config(), pillars=random_pillars(small_config()))
    new, old = tmp_path / "new", tmp_path / "old"
    export(source, old)
    before = sha256_file(old / "manifest.json")
    script = """
        import os, signal, sys
        from export import write
        from export.pipeline import export
        # dies when the weights are there and the rest is not
        write.copy_tokenizer = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        for out in sys.argv[2:]:
            child = os.fork()
            if not child:
                export(sys.argv[1], out, force=True)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), source, new, old],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert killed.stdout.split() == [str(-signal.SIGKILL)] * 2, killed.stderr
    assert not new.exists()
    assert sha256_file(old / "manifest.json") == before
    load_artifact(old)
    for out in (new, old):
        export(source, out, force=True)  # what the dead process left aside does not stand in the way
        load_artifact(out)
