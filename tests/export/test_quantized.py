"""Whole exports into int8 and int4: what is written is what the manifest says, and what cannot be is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from export import quantize as quantize_module
from export.cli import main as export_main
from export.compact import compact_model, read_source
from export.options import Options
from export.pipeline import export
from export.texts import STDLIB, read_texts, split_sources
from export.verify import make_probe
from tests.export.fixtures import TEXT, lora, small_config, write_adapter, write_source, write_trained_run
from tests.export.test_cli import _error
from yunmin.artifact import Manifest, load_artifact
from yunmin.cli import run
from yunmin.commands.inspect import main as inspect_main
from yunmin.cost import cost_of
from yunmin.errors import CheckpointError, ConfigError, DataError, TokenizerError, VerificationError
from yunmin.perplexity import perplexity
from yunmin.quantization.layout import Format, Quantization
from yunmin.quantization.packing import QuantizedWeight
from yunmin.quantization.reference import dequantized, network_of
from yunmin.quantization.rounding import round_tensors
from yunmin.tokenizer import Tokenizer

FORMATS: list[Format] = ["int8", "int4"]
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "held-out.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trained_run(tmp_path_factory.mktemp("run"), small_config())


@pytest.fixture(scope="module", params=FORMATS)
def artifact(
    request: pytest.FixtureRequest, run_folder: Path, text: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("artifacts") / request.param
    calibrate = text if request.param == "int4" else None
    options = Options(data=text, quantize=request.param, calibrate=calibrate, measured_tokens=1500)
    export(run_folder, out, options=options)
    return out


def test_manifest_tells_the_bytes_in_the_file(artifact: Path) -> None:
    checkpoint, manifest = load_artifact(artifact)
    assert manifest.quantization == checkpoint.quantization.format == artifact.name
    assert manifest.after["weight_bytes"] == sum(t.nbytes for t in checkpoint.tensors.values())
    assert manifest.after == cost_of(checkpoint.config, checkpoint.quantization).to_dict()
    assert manifest.before["weight_bytes"] == 4 * manifest.before["parameters"]
    file = artifact / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert manifest.files["model.safetensors"].bytes == header + manifest.after["weight_bytes"]


def test_manifest_tells_the_perplexities(artifact: Path, run_folder: Path, text: str) -> None:
    checkpoint, manifest = load_artifact(artifact)
    assert checkpoint.tokenizer is not None
    texts = read_texts(checkpoint.tokenizer, 300, text, None, calibrates=artifact.name == "int4", measured_tokens=1500)
    networks = {"before": None, "after": network_of(checkpoint)}
    compact = compact_model(read_source(run_folder), torch.float32)
    from yunmin.model import MambaLM

    networks["before"] = MambaLM.from_tensors(compact.config, compact.tensors)
    for key, network in networks.items():  # an activation at the edge of two levels may round to either
        assert network is not None
        record = manifest.perplexity[key]
        expected = perplexity(network, texts.measured.token_ids)
        assert record.token_perplexity == pytest.approx(expected.token_perplexity, rel=1e-3), key
        assert (record.tokens, record.window, record.stride) == (expected.tokens, 512, 512)
        assert record.source == texts.measured.source


def test_runtime_is_proven_against_the_integers_in_plain_torch(artifact: Path) -> None:
    _, manifest = load_artifact(artifact)
    assert list(manifest.parity) == ["float64", "float32", "stepwise", "layers", "quantized"]
    assert all(parity.holds and parity.tokens > 20 for parity in manifest.parity.values())


def test_quantized_artifact_is_near_the_exact_one(artifact: Path, run_folder: Path) -> None:
    checkpoint, _ = load_artifact(artifact)
    exact = compact_model(read_source(run_folder), torch.float32)
    assert checkpoint.config == exact.config
    for name, tensor in dequantized(checkpoint).tensors.items():
        error = float((tensor - exact.tensors[name]).norm() / exact.tensors[name].norm())
        if checkpoint.quantization.of(name) is None:
            assert error == 0, name
        else:
            assert error < (0.2 if checkpoint.quantization.of(name) == "int4" else 0.01), name


def test_card_and_inspect_show_format_bytes_and_perplexities(artifact: Path, capsys: Captured) -> None:
    manifest = load_artifact(artifact)[1]
    after, measured = manifest.after["weight_bytes"], manifest.perplexity["after"].token_perplexity
    card = (artifact / "README.md").read_text()
    assert run(inspect_main, [str(artifact)]) == 0
    shown = capsys.readouterr().out
    for shown_text in (card, shown):
        assert artifact.name in shown_text
        assert f"{after:,}" in shown_text
        assert f"{measured:,.3f}" in shown_text
        assert "window 512, stride 512" in shown_text
    assert card.startswith("---\nlibrary_name: yunmin\n")
    assert "from transformers" not in card


def test_quantized_artifact_is_no_source_of_another_export(artifact: Path, tmp_path: Path, capsys: Captured) -> None:
    for arguments in ([], ["--quantize", "int4"]):
        assert run(export_main, [str(artifact), str(tmp_path / "out"), *arguments]) == 1
        assert f"expected float32 weights, found {artifact.name} ones" in _error(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize(
    "config",
    [small_config(uniform=False), small_config(tied=False, bias=False), small_config()],
    ids=["cut", "untied", "biases"],
)
def test_any_model_quantizes_with_adapters_merged(tmp_path: Path, weight_format: Format, config: Any) -> None:
    source = write_source(tmp_path / "source", config)
    adapter = write_adapter(tmp_path / "adapter", config, lora("in_proj", "embeddings"))
    options = Options(quantize=weight_format, measured_tokens=600)
    manifest = export(source, tmp_path / "out", adapters=[adapter], options=options)
    checkpoint, _ = load_artifact(tmp_path / "out")
    assert not checkpoint.config.tie_word_embeddings
    assert "lm_head.weight.int8" in checkpoint.tensors
    assert manifest.perplexity["after"].source == "stdlib, 5% held out"


def test_model_without_tokenizer_quantizes_and_measures_nothing(tmp_path: Path, capsys: Captured) -> None:
    write_source(tmp_path / "source", small_config(), tokenizer=False)
    assert run(export_main, [str(tmp_path / "source"), str(tmp_path / "out"), "--quantize", "int8", "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["quantization"] == "int8"
    assert manifest["perplexity"] == {}
    assert run(inspect_main, [str(tmp_path / "out")]) == 0
    with pytest.raises(TokenizerError, match="need a tokenizer"):
        export(tmp_path / "source", tmp_path / "o", options=Options(quantize="int4", calibrate=STDLIB))


def test_wrong_integers_are_noticed_and_not_written(
    run_folder: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runtime and the reference read the same file, so what differs is the runtime: here a state of its own."""
    from yunmin.runtime.native.runtime import NativeRuntime

    forward = NativeRuntime.forward
    monkeypatch.setattr(NativeRuntime, "forward", lambda self, ids: forward(self, ids).roll(1, dims=1))
    with pytest.raises(VerificationError, match="differ from those of the stored integers in plain torch"):
        export(run_folder, tmp_path / "out", options=Options(data=text, quantize="int8"))
    assert list(tmp_path.iterdir()) == []


def test_weight_that_cannot_be_quantized_is_refused_by_name(
    run_folder: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(tensors: dict[str, torch.Tensor], quantized: Quantization) -> dict[str, QuantizedWeight]:
        name = "backbone.layers.1.mixer.out_proj.weight"
        return round_tensors({**tensors, name: torch.full_like(tensors[name], torch.nan)}, quantized)

    monkeypatch.setattr(quantize_module, "round_tensors", spoiled)
    with pytest.raises(CheckpointError, match=r"^backbone.layers.1.mixer.out_proj.weight: to be quantized"):
        export(run_folder, tmp_path / "out", options=Options(data=text, quantize="int8"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--quantize", "int8", "--calibrate", "stdlib"],
            "--calibrate stdlib: expected --quantize int4, --max-perplexity-increase, or",
        ),
        (
            ["--calibrate", "stdlib"],
            "--calibrate stdlib: expected --quantize int4, --max-perplexity-increase, or",
        ),
        (["--quantize", "int8", "--tokens", "1"], "--tokens must be at least 2, got 1"),
        (["--max-perplexity-increase", ""], "--max-perplexity-increase: expected a share like 2% or 0.02, found ''"),
        (["--quantize", "int4", "--calibrate", "missing.txt"], "missing.txt: expected a text file"),
    ],
    ids=["int8", "none", "tokens", "increase", "missing"],
)
def test_what_makes_no_sense_is_one_clear_line(
    run_folder: Path, tmp_path: Path, capsys: Captured, arguments: list[str], message: str
) -> None:
    assert run(export_main, [str(run_folder), str(tmp_path / "out"), *arguments]) == 1
    assert message in _error(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("data", [None, STDLIB, "file"])
@pytest.mark.parametrize("calibrate", [None, STDLIB, "file", "folder"])
def test_text_is_never_both_measured_and_calibrated_on(tmp_path: Path, data: str | None, calibrate: str | None) -> None:
    whole = "".join(f"{i} {i * i} lines that differ, {i % 7}\n" for i in range(900))
    (tmp_path / "file.txt").write_text(whole)
    (tmp_path / "other.txt").write_text("".join(f"another {i * 31 % 1009} text\n" for i in range(900)))
    names = {None: None, STDLIB: STDLIB, "file": str(tmp_path / "file.txt"), "folder": str(tmp_path)}
    measured, rest, sources = split_sources(names[data] or STDLIB, names[calibrate] or names[data] or STDLIB)
    assert measured
    assert rest
    assert not set(measured) & set(rest)
    assert sources[0] != sources[1]
    if data == "file" and calibrate in (None, "file"):
        assert "".join(document.text for document in [*rest, *measured]) == whole


def test_calibrating_on_nothing_but_the_measured_text_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(TEXT)
    with pytest.raises(DataError, match=r"b.txt: nothing is left to calibrate on that .*a.txt does not measure on"):
        read_texts(Tokenizer.train([TEXT], 300), 300, str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), calibrates=True)


def test_old_manifests_without_perplexity_are_read() -> None:
    fields: dict[str, Any] = {"format_version": 1, "provenance": {}, "files": {}, "before": {}, "after": {}}
    manifest = Manifest(**fields, cuts=[], parity={})
    assert (manifest.quantization, manifest.perplexity) == ("none", {})


def test_options_refuse_calibration_without_int4() -> None:
    with pytest.raises(ConfigError, match="expected --quantize int4"):
        Options(calibrate=STDLIB)
    assert make_probe(None, 10).tokens > 0
