"""The comparison of channel orders for int4."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from research.quantization_orders import compare_orders, main
from tests.export.fixtures import small_config, write_trained_run
from yunmin.cli import run


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trained_run(tmp_path_factory.mktemp("run"), small_config())


def test_comparison_prints_one_line_per_order(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(main, [str(run_folder), "--tokens", "300", "--calibration-tokens", "600"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:7]] == [
        "float32", "trained", "identity", "random", "correlation", "quantization",
    ]  # fmt: skip
    assert "300 tokens of stdlib, 5% held out" in lines[-2]


def test_comparison_prints_one_json_object(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(main, [str(run_folder), "--tokens", "300", "--calibration-tokens", "600", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == compare_orders(str(run_folder), measured_tokens=300, calibration_tokens=600)
    labels = {"nearest", "calibrated", "nearest_divergence", "calibrated_divergence"}
    assert set(result["orders"]["random"]) == {"W_x", "W_out", "W_in"} | labels
    assert all(found["nearest_divergence"] > 0 for found in result["orders"].values())
    assert (result["tokens"], result["calibration"]["tokens"]) == (300, 512)
