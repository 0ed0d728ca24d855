"""The search for the smallest precision and width: what it picks, what it prints, what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from export import search as search_module
from export.cli import main as export_main
from export.compact import compact_model, read_source
from export.cut import channel_importance, cut_channels, kept_channels, observed
from export.options import Options
from export.pipeline import export
from export.search import FORMATS, Search, parse_increase
from export.texts import Text, Texts
from tests.export.fixtures import random_pillars, small_config, write_source, write_trained_run
from tests.export.test_cli import _error
from tests.models import random_tensors
from yunmin.artifact import PerplexityRecord, load_artifact
from yunmin.checkpoint import Checkpoint
from yunmin.cli import run
from yunmin.commands.inspect import main as inspect_main
from yunmin.config import MambaConfig
from yunmin.errors import ConfigError, VerificationError
from yunmin.gated import FixedGate, GatedMixer
from yunmin.model import MambaLM
from yunmin.pillars import Pillars
from yunmin.quantization.layout import Quantization, stored_bytes
from yunmin.trained import set_fixed_gates

CONFIG = small_config().with_widths(d_inner=(80, 64))
TEXTS = Texts(Text(torch.arange(40), "measured"), Text(torch.arange(64) % 50, "calibration"))
BEFORE = PerplexityRecord(token_perplexity=100.0, tokens=39, window=512, stride=512, source="measured")
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def exact() -> Checkpoint:
    return Checkpoint(CONFIG, random_tensors(CONFIG), None, Path("nowhere"))


def _search(exact: Checkpoint, monkeypatch: pytest.MonkeyPatch, limit: float, narrowest: dict[str, int]) -> Search:
    """A search in which a format's perplexity is fine down to some width, and rises below."""

    def fake(checkpoint: Checkpoint, *_: Any) -> PerplexityRecord:
        width, least = max(checkpoint.config.d_inner), narrowest[checkpoint.quantization.format]
        rise = 1.0 if width >= least else 5.0 + least - width
        return BEFORE.model_copy(update={"token_perplexity": 100.0 + rise})

    monkeypatch.setattr(search_module, "measure", fake)
    return Search(exact, BEFORE, limit, TEXTS, calibrates=False, multiple=8, report=lambda _: None)


@pytest.mark.parametrize(
    ("narrowest", "expected"),
    [
        ({"int4": 80, "int8": 80, "none": 80}, ("int4", 80)),
        ({"int4": 24, "int8": 24, "none": 24}, ("int4", 24)),
        ({"int4": 73, "int8": 8, "none": 80}, ("int8", 8)),
        ({"int4": 99, "int8": 56, "none": 8}, None),
        ({"int4": 99, "int8": 99, "none": 40}, ("none", 40)),
        ({"int4": 41, "int8": 80, "none": 80}, ("int4", 48)),
    ],
    ids=str,
)
def test_smallest_that_passes_is_found(
    exact: Checkpoint, monkeypatch: pytest.MonkeyPatch, narrowest: dict[str, int], expected: tuple[str, int] | None
) -> None:
    found = _search(exact, monkeypatch, 102.0, narrowest).smallest()
    # by trying everything
    every = [
        (stored_bytes(CONFIG.with_widths(d_inner=(w, min(w, 64))), Quantization(f)), f, w)
        for f in FORMATS
        for w in range(8, 81, 8)
        if w >= narrowest[f]
    ]
    size, weight_format, width = min(every)
    assert (found.chosen.format, found.chosen.width, found.chosen.bytes) == (weight_format, width, size)
    assert expected is None or (weight_format, width) == expected
    assert found.checkpoint.quantization.format == weight_format
    assert max(found.checkpoint.config.d_inner) == width
    assert [index.numel() for index in found.kept] == [width, min(width, 64)]
    assert found.curve[0].is_whole(80)
    assert [c.bytes for c in found.curve] == sorted((c.bytes for c in found.curve), reverse=True)
    assert len(found.curve) < 16


def test_nothing_smaller_is_refused_with_the_closest(exact: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    search = _search(exact, monkeypatch, 100.5, {"int4": 999, "int8": 80, "none": 80})
    size = stored_bytes(CONFIG, Quantization("int8"))
    message = f"at most 100.5000; the closest of .* is int8 at width 80 with 101.0000 in {size:,} bytes"
    with pytest.raises(VerificationError, match=message):
        search.smallest()


@pytest.mark.parametrize(("text", "share"), [("2%", 0.02), ("0.5 %", 0.005), ("0.02", 0.02), (" 10% ", 0.1)])
def test_increase_is_a_share_or_percents(text: str, share: float) -> None:
    assert parse_increase(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "%", "2", "-1%", "0", "two", "nan", "100%"])
def test_other_increases_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected a share like 2% or 0\.02"):
        parse_increase(text)


def test_cut_model_equals_one_whose_channels_are_gated_off(exact: Checkpoint) -> None:
    kept = kept_channels(channel_importance(exact, observed(exact, TEXTS.measured)), 48)
    cut = cut_channels(exact, kept)
    assert cut.config.d_inner == (48, 48)
    gates = [torch.zeros(width).index_fill(0, index, 1.0) for width, index in zip(CONFIG.d_inner, kept, strict=True)]
    gated = MambaLM.from_tensors(CONFIG, {n: t.double() for n, t in exact.tensors.items()}, mixer=GatedMixer)
    pillars = Pillars.identity(CONFIG)
    set_fixed_gates(gated, Pillars(tuple(gates), pillars.state_gates, pillars.scan_order))
    ids = torch.arange(40).view(2, 20)
    found = MambaLM.from_tensors(cut.config, {n: t.double() for n, t in cut.tensors.items()})(ids)
    torch.testing.assert_close(found, gated(ids), rtol=1e-10, atol=1e-10)
    assert isinstance(gated.backbone.blocks[0].mixer.channel_gate, FixedGate)


def test_channels_that_add_nothing_go_first(exact: Checkpoint) -> None:
    name = "backbone.layers.0.mixer.out_proj.weight"
    silent = torch.tensor([3, 17, 70])
    tensors = {**exact.tensors, name: exact.tensors[name].index_fill(1, silent, 0.0)}
    quiet = Checkpoint(exact.config, tensors, None, exact.folder)
    kept = kept_channels(channel_importance(quiet, observed(quiet, TEXTS.measured)), 77)
    assert set(range(80)) - set(kept[0].tolist()) == set(silent.tolist())
    assert kept[1].tolist() == list(range(64))  # narrower than the cut: left alone


def test_export_prints_the_curve_and_keeps_it(tmp_path: Path, capsys: Captured) -> None:
    write_trained_run(tmp_path / "run", small_config())
    arguments = [str(tmp_path / "run"), str(tmp_path / "out"), "--max-perplexity-increase", "50%", "--tokens", "600"]
    assert run(export_main, arguments) == 0
    output = capsys.readouterr().out
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    search = manifest["provenance"]["search"]
    for point in search["curve"]:
        assert re.search(rf"{point['precision']} +{point['width']} +{point['bytes']:,} ", output)
    assert search["limit"] == pytest.approx(1.5 * manifest["perplexity"]["before"]["token_perplexity"])
    assert manifest["after"]["weight_bytes"] == min(p["bytes"] for p in search["curve"] if p["passes"])
    assert manifest["perplexity"]["after"]["token_perplexity"] <= search["limit"]
    assert "perplexity_curve.png" in manifest["files"]
    assert "This is the smallest of these" in (tmp_path / "out/README.md").read_text()
    assert run(inspect_main, [str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    for point in search["curve"]:
        assert re.search(rf"{point['precision']} +{point['width']} +{point['bytes']:,} ", shown)


@pytest.mark.parametrize("weight_format", ["int8", "none"])
def test_cut_artifact_says_that_it_is_approximate_and_is_proven_against_the_cut_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight_format: str
) -> None:
    config: MambaConfig = small_config(tied=False)
    source = write_source(tmp_path / "source", config, pillars=random_pillars(config))
    monkeypatch.setattr(search_module, "FORMATS", ("none",))
    monkeypatch.setattr("export.change.FORMATS", (weight_format,))
    options = Options(max_increase=0.9, measured_tokens=600, calibration_tokens=600, width_multiple=8)
    manifest = export(source, tmp_path / "out", options=options)
    checkpoint, _ = load_artifact(tmp_path / "out")
    width = checkpoint.config.d_inner[0]
    assert width < 24
    assert manifest.quantization == weight_format
    cut = manifest.provenance["approximate_cut"]
    assert (cut["inner_width"], cut["of"], cut["ranked_on"]["source"]) == (width, 24, "stdlib, the other 95%")
    claims = {"cut"} if weight_format == "none" else {"layers", "quantized"}
    assert set(manifest.parity) == {"float64", "float32", "stepwise"} | claims
    exact = compact_model(read_source(source))
    import numpy as np

    order = np.load(tmp_path / "out/scan_order.npy").tolist()
    for layer in range(2):
        assert len(order[layer]) == width
        positions = [exact.channels[layer].tolist().index(channel) for channel in order[layer]]
        assert positions == sorted(positions)
    assert "is approximate" in (tmp_path / "out/README.md").read_text()


def test_a_small_limit_is_not_printed_as_zero(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(tmp_path / "source", small_config())
    monkeypatch.setattr(search_module, "measure", lambda *_: BEFORE)
    monkeypatch.setattr("export.pipeline.measure", lambda *_: BEFORE)
    arguments = [str(tmp_path / "source"), str(tmp_path / "out"), "--max-perplexity-increase", "0.002%"]
    assert run(export_main, [*arguments, "--tokens", "300", "--calibration-tokens", "300"]) == 0
    assert "(the smallest within 0.002 % was taken" in capsys.readouterr().out
    assert "rises by at most 0.002 %:" in (tmp_path / "out/README.md").read_text()


def test_impossible_limit_is_one_clear_line_and_nothing_is_written(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(tmp_path / "source", small_config())
    worse = BEFORE.model_copy(update={"token_perplexity": 1e9})
    monkeypatch.setattr(search_module, "measure", lambda *_: worse)
    arguments = [str(tmp_path / "source"), str(tmp_path / "out"), "--max-perplexity-increase", "1%", "--tokens", "300"]
    assert run(export_main, arguments) == 1
    assert "nothing smaller than the float32 model has a perplexity of at most" in _error(capsys)
    assert not (tmp_path / "out").exists()
