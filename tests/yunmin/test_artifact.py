"""An artifact is what its manifest says, or it is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import yunmin
from tests.models import small_config, trained_tokenizer, write_model
from yunmin.artifact import Parity, load_artifact, read_manifest, write_manifest
from yunmin.cost import cost_of
from yunmin.errors import ArtifactError

PARITY = Parity(max_abs_error=1e-6, largest_logit=5.0, tolerance=1e-4, tokens=10)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = write_model(tmp_path / "artifact", tokenizer=trained_tokenizer())
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"graph")
    cost = cost_of(small_config())
    cuts = [{"d_inner_before": 40, "d_inner_after": 40, "d_state_before": 5, "d_state_after": 5}] * 2
    write_manifest(folder, provenance={"source": "x"}, before=cost, after=cost, cuts=cuts, parity={"float32": PARITY})
    return folder


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_artifact_loads_and_lists_every_file(artifact: Path) -> None:
    checkpoint, manifest = load_artifact(artifact)
    assert checkpoint.config == small_config(eos_token_ids=checkpoint.config.eos_token_ids)
    present = {p.relative_to(artifact).as_posix() for p in artifact.rglob("*") if p.is_file()}
    assert set(manifest.files) | {"manifest.json"} == present
    assert yunmin.load(artifact).generate("def", max_tokens=3, seed=0).token_ids


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "onnx/model.onnx"]
)
@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_changed_or_missing_file_is_named(artifact: Path, name: str, damage: str) -> None:
    path = artifact / name
    if damage == "missing":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(ArtifactError, match="wrong hash" if damage == "changed" else "is missing") as caught:
        yunmin.load(artifact)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"format_version": 2}, "expected format_version 1, found 2"),
        ({"format_version": 2, "new_key": 1}, "expected format_version 1, found 2"),
        ({"format_version": "x"}, "format_version"),
        ({"new_key": 1}, "new_key"),
        ({"quantization": "int3"}, "quantization"),
        ({"files": {}}, r"expected a record of config\.json"),
        ({"files": {"../secret": {"sha256": "0", "bytes": 1}}}, r"'\.\./secret' leaves the folder"),
        ({"files": {"/etc/passwd": {"sha256": "0", "bytes": 1}}}, "'/etc/passwd' leaves the folder"),
        ({"files": {"a/../../b": {"sha256": "0", "bytes": 1}}}, "leaves the folder"),
    ],
)
def test_a_manifest_of_another_format_or_with_names_outside_is_refused(
    artifact: Path, changes: dict[str, Any], named: str
) -> None:
    edit_manifest(artifact, **changes)
    with pytest.raises(ArtifactError, match=named) as caught:
        yunmin.load(artifact)
    assert "manifest.json" in str(caught.value)


@pytest.mark.parametrize("damage", ["perplexity", "after"])
def test_figures_of_before_without_those_of_after_are_refused(artifact: Path, damage: str) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    record = {"token_perplexity": 2.0, "tokens": 9, "window": 512, "stride": 512, "source": "text"}
    if damage == "perplexity":
        manifest["perplexity"] = {"before": record}
    else:
        del manifest["after"]["state_bytes"]
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="after"):
        read_manifest(artifact)


def test_a_file_that_would_be_read_without_a_record_is_refused(artifact: Path) -> None:
    files = json.loads((artifact / "manifest.json").read_text())["files"]
    del files["tokenizer.json"]
    edit_manifest(artifact, files=files)
    with pytest.raises(ArtifactError, match=r"expected a record of tokenizer\.json"):
        yunmin.load(artifact)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_a_damaged_manifest_is_refused(artifact: Path, content: bytes) -> None:
    (artifact / "manifest.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        read_manifest(artifact)


def test_a_folder_without_manifest_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"expected an artifact with a manifest\.json, found none"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("error", "largest", "holds"),
    [(1e-5, 1.0, True), (1e-3, 1.0, False), (math.nan, 1.0, False), (1e-9, 0.0, False), (0.0, math.nan, False)],
)
def test_parity_holds_only_within_its_tolerance(error: float, largest: float, holds: bool) -> None:
    assert Parity(max_abs_error=error, largest_logit=largest, tolerance=1e-4, tokens=1).holds is holds
