"""`yunmin export` and `yunmin inspect` as a user meets them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from export.cli import main as export_main
from tests.export.fixtures import lora, small_config, write_adapter, write_source, write_trained_run
from yunmin.cli import run
from yunmin.commands.inspect import main as inspect_main

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    run_folder = write_trained_run(folder / "run", small_config())
    assert run(export_main, [str(run_folder), str(folder / "artifact"), "--json"]) == 0
    return folder / "artifact"


def _copy(artifact: Path, target: Path) -> Path:
    shutil.copytree(artifact, target)
    return target


def _error(captured: Captured) -> str:
    """The one line on stderr that is no progress."""
    output = captured.readouterr()
    assert output.out == ""
    lines = [line for line in output.err.splitlines() if not line.endswith(" ...")]
    assert len(lines) == 1, output.err
    assert lines[0].startswith("yunmin: error: ")
    return lines[0]


def test_export_prints_sizes_parity_and_what_to_do_next(tmp_path: Path, capsys: Captured) -> None:
    write_trained_run(tmp_path / "run", small_config())
    assert run(export_main, [str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    output = capsys.readouterr()
    assert "reading ..." in output.err
    for quantity in ("parameters", "weight bytes", "FLOPs per token", "state bytes"):
        assert re.search(rf"{quantity}.*\d.*\d.*0\.\d\d\d", output.out), quantity
    assert re.search(r"fp64 +\d\.\de-1\d +1e-10", output.out)
    assert f"yunmin inspect {tmp_path / 'out'}" in output.out
    assert f"yunmin serve {tmp_path / 'out'}" in output.out


def test_export_prints_one_json_object(tmp_path: Path, capsys: Captured) -> None:
    source = write_source(tmp_path / "source", small_config(), tokenizer=False)
    adapter = write_adapter(tmp_path / "adapter", small_config(), lora("x_proj"))
    assert run(export_main, [str(source), str(tmp_path / "out"), "--adapter", str(adapter), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed.pop("artifact") == str(tmp_path / "out")
    assert printed == json.loads((tmp_path / "out/manifest.json").read_text())
    assert printed["provenance"]["adapters"][0]["path"] == str(adapter)


def test_export_verifies_on_the_users_text(tmp_path: Path, capsys: Captured) -> None:
    source = write_source(tmp_path / "source", small_config())
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"record {i} of some text"}) for i in range(9)))
    assert run(export_main, [str(source), str(tmp_path / "out"), "--data", str(data), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["provenance"]["verified_on"] == str(data)


def test_inspect_shows_all_of_it(artifact: Path, capsys: Captured) -> None:
    assert run(inspect_main, [str(artifact)]) == 0
    shown = capsys.readouterr().out
    manifest = json.loads((artifact / "manifest.json").read_text())
    for name, file in manifest["files"].items():
        assert re.search(rf"{re.escape(name)} .*{file['sha256']}", shown), name
    for key, value in manifest["before"].items():
        after = manifest["after"][key]
        assert re.search(rf"{key.replace('_', ' ')} +{value:,} +{after:,} +{after / value:.3f}", shown), key
    assert len(re.findall(r"24 of 32 +4 of 6", shown)) == 2
    assert re.search(r"source +.*run", shown)
    assert re.search(r"adapters\.1\.kind +IA3", shown)
    assert re.search(r"verified_on +standard library", shown)
    assert re.search(r"fp64 +\S+e-1\d +1e-10", shown)


def test_inspect_prints_the_manifest_as_json(artifact: Path, capsys: Captured) -> None:
    assert run(inspect_main, [str(artifact), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"artifact": str(artifact), **json.loads((artifact / "manifest.json").read_text())}


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _reshape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["backbone.layers.1.mixer.D"] = tensors["backbone.layers.1.mixer.D"][:-1].clone()
    save_file(tensors, folder / "model.safetensors")


def _edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "model.safetensors is damaged or truncated"),
        (_reshape, r"tensor 'backbone.layers.1.mixer.D': expected shape \(32,\), found \(31,\)"),
        (_edit_config(d_stat=16), "unknown key 'd_stat'"),
        (_edit_config(conv_kernel=-1), "d_conv must be an integer >= 2, got -1"),
        (_remove("model.safetensors"), "expected model.safetensors"),
        (_remove("config.json"), "expected a config.json or checkpoint-STEP folders, found neither"),
        (_remove("scan_order.npy"), "scan_order.npy: missing"),
        (
            lambda folder: (folder / "pillars.safetensors").write_bytes(b"{"),
            "pillars.safetensors: damaged or truncated",
        ),
    ],
    ids=["truncated", "shape", "unknown-key", "impossible", "no-weights", "no-config", "no-order", "pillars"],
)
def test_damaged_source_is_one_clear_line(
    tmp_path: Path, capsys: Captured, damage: Callable[[Path], None], message: str
) -> None:
    source = write_trained_run(tmp_path / "run", small_config()) / "checkpoint-20"
    damage(source)
    assert run(export_main, [str(source), str(tmp_path / "out")]) == 1
    assert re.search(message, _error(capsys))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing", "out"], "missing: expected a checkpoint folder or a Hub id, found no such folder"),
        (["source", "source"], "source: exists already; --force replaces an artifact"),
        (["source", "out", "--adapter", "missing"], "missing: expected an adapter folder with adapter_config.json"),
        (["source", "out", "--adapter", "foreign"], r"lora_A of backbone.layers.0.mixer.in_proj: expected shape"),
        (["source", "out", "--adapter", "deeper"], r"deeper: adapts 'backbone.layers.2.mixer.in_proj'"),
        (
            ["source", "out", "--adapter", "lora", "--adapter", "lora"],
            "adapts backbone.layers.0.mixer.in_proj, as does",
        ),
        (["source", "out", "--data", "missing.txt"], "missing.txt: expected a text file"),
    ],
    ids=["source", "destination", "adapter", "other-width", "other-depth", "twice", "data"],
)
def test_bad_argument_is_one_clear_line(
    tmp_path: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    config = small_config()
    write_source(Path("source"), config)
    write_adapter(Path("lora"), config, lora("in_proj"))
    wider = type(config).create(vocab_size=300, d_model=20, n_layers=2)
    deeper = type(config).create(vocab_size=300, d_model=16, n_layers=3, dt_rank=3, d_state=6)
    write_adapter(Path("foreign"), wider, lora("in_proj"))
    write_adapter(Path("deeper"), deeper, lora("in_proj"))
    assert run(export_main, arguments) == 1
    assert re.search(message, _error(capsys))
    assert not Path("out").exists()


def _flip(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def _newer(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 2, "a_new_field": 1}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip, "model.safetensors: wrong hash"),
        (_newer, "manifest.json: expected format_version 1, found 2"),
        (_remove("scan_order.npy"), "scan_order.npy is missing"),
        (_remove("manifest.json"), "expected an artifact with a manifest.json, found none"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "manifest.json: format_version"),
        (lambda folder: (folder / "manifest.json").write_text("no json"), "manifest.json: .*JSON"),
    ],
    ids=["hash", "newer", "file", "manifest", "empty", "no-json"],
)
def test_inspect_refuses_a_damaged_artifact_in_one_line(
    artifact: Path, tmp_path: Path, capsys: Captured, damage: Callable[[Path], None], message: str
) -> None:
    folder = _copy(artifact, tmp_path / "artifact")
    damage(folder)
    assert run(inspect_main, [str(folder)]) == 1
    assert re.search(message, _error(capsys))


def test_inspect_refuses_what_is_no_folder(tmp_path: Path, capsys: Captured) -> None:
    assert run(inspect_main, [str(tmp_path / "missing")]) == 1
    assert "missing: expected an artifact" in _error(capsys)
