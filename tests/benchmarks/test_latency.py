"""What the latency benchmark measures and how it reports it; no timing is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.latency import Worker, measure_models, percentile, summarize
from benchmarks.report import comparison_row, latency_table, plot_latency, short_names, text_table
from benchmarks.worker import describe, measure
from tests.models import random_model, small_config, write_model
from yunmin.cli import main
from yunmin.errors import YunminError
from yunmin.language_model import LanguageModel, load
from yunmin.machine import machine_facts, memory_bytes
from yunmin.state import MambaState


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two loadable checkpoints, the second one wider."""
    paths = [tmp_path / "compact", tmp_path / "dense"]
    for path, inner in zip(paths, (24, 40), strict=True):
        write_model(path, small_config(d_inner=(inner, inner)))
    return paths


def test_summary_takes_medians_over_repeats_and_percentiles_over_steps() -> None:
    runs = [
        {"prefill_s": 2.0, "first_token_s": 2.5, "step_s": [0.1, 0.1]},
        {"prefill_s": 1.0, "first_token_s": 1.5, "step_s": [0.2, 0.2]},
        {"prefill_s": 9.0, "first_token_s": 9.5, "step_s": [0.5, 1.5]},
    ]
    assert summarize(10, runs) == pytest.approx(
        {
            "prefill_tokens_per_s": 5.0,
            "time_to_first_token_ms": 2500.0,
            "decode_tokens_per_s": 5.0,
            "per_token_p50_ms": 200.0,
            "per_token_p95_ms": 1250.0,
        }
    )


@pytest.mark.parametrize(("values", "share"), [([7.0], 0.95), ([1.0, 2.0, 4.0], 0.5), ([0.0, 1.0, 5.0, 9.0], 0.95)])
def test_percentile_equals_numpys(values: list[float], share: float) -> None:
    import numpy as np

    assert percentile(values, share) == pytest.approx(float(np.percentile(values, 100 * share)))


def test_a_request_is_one_prefill_and_one_step_for_each_further_token(folders: list[Path]) -> None:
    model = load(folders[0])
    lengths: list[int] = []
    runtime = model.runtime
    original_prefill, original_step = runtime.prefill, runtime.step

    def prefill(token_ids: list[int], state: MambaState | None = None) -> tuple[Tensor, MambaState]:
        lengths.append(len(token_ids))
        return original_prefill(token_ids, state)

    def step(token_ids: list[int], state: MambaState) -> tuple[Tensor, MambaState]:
        lengths.append(len(token_ids))
        return original_step(token_ids, state)

    runtime.prefill, runtime.step = prefill, step  # type: ignore[method-assign, assignment]
    found = measure(model, prompt_tokens=7, new_tokens=5)
    assert lengths == [7, 1, 1, 1, 1]
    assert len(found.step_s) == 4
    assert 0 < found.prefill_s <= found.first_token_s


def test_description_counts_the_tensors_that_are_there() -> None:
    model = random_model()
    found = describe(LanguageModel.of_network(model, None, Path("nowhere")), "source")
    assert found["parameters"] == sum(t.numel() for t in model.tensors().values())
    assert found["weight_bytes"] == 4 * found["parameters"]
    assert found["artifact_bytes"] is None
    assert found["threads"] == torch.get_num_threads()


def test_ratio_is_the_first_to_the_second_and_absent_where_a_value_is() -> None:
    assert comparison_row("x", [1.0, 4.0], lambda v: f"{v:g}") == ["x", "1", "4", "0.250"]
    assert comparison_row("x", [None, 4.0], lambda v: f"{v:g}") == ["x", "–", "4", "–"]
    assert comparison_row("x", [3.0], lambda v: f"{v:g}") == ["x", "3"]


def test_names_in_tables_are_as_long_as_it_takes_to_tell_them_apart() -> None:
    assert short_names(["/a/b/compact", "/a/b/dense"]) == ["compact", "dense"]
    assert short_names(["runs/one/checkpoint-5", "runs/two/checkpoint-5"]) == ["one/checkpoint-5", "two/checkpoint-5"]
    assert short_names(["same", "same"]) == ["same", "same"]
    assert short_names(["/x/a", "a"]) == ["x/a", "a"]


def test_table_shows_names_with_brackets_as_they_are() -> None:
    assert "runs/[red]/x" in text_table("Title", ["", "runs/[red]/x"], [["row", "1"]])


def test_machine_facts_name_the_cpu_and_the_versions() -> None:
    facts = machine_facts()
    assert facts["cpu"]
    assert facts["torch"] == torch.__version__
    assert 1 <= facts["cores_usable"] <= facts["cores_logical"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_peak_memory_of_a_child_does_not_begin_with_its_parents() -> None:
    ballast = bytearray(400_000_000)
    ballast[::4096] = bytes(len(ballast[::4096]))  # touched, hence resident
    code = "from yunmin.machine import memory_bytes; print(memory_bytes()[1])"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert memory_bytes()[0] > len(ballast)
    assert int(child.stdout) < 200_000_000
    del ballast


@pytest.mark.slow
def test_two_models_are_measured_in_one_run_with_ratios_files_and_json(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results"
    argv = ["bench", "latency", str(folders[0]), "--against", str(folders[1]), "--threads", "1"]
    argv += ["--prompt-tokens", "3,9", "--new-tokens", "4", "--repeats", "2", "--out", str(out), "--json"]
    assert main(argv) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((out / "latency.json").read_text())
    assert (out / "latency.png").read_bytes().startswith(b"\x89PNG")
    assert [model["source"] for model in result["models"]] == [str(f) for f in folders]
    for model in result["models"]:
        assert model["threads"] == 1
        assert model["peak_memory_bytes"] >= model["memory_before_load_bytes"] > 0
        assert {n: len(runs) for n, runs in model["samples"].items()} == {"3": 2, "9": 2}
        assert all(len(run["step_s"]) == 3 for runs in model["samples"].values() for run in runs)
    table = latency_table(result)
    compact, dense = (model["parameters"] for model in result["models"])
    assert f"{compact:,}" in table
    assert f"{compact / dense:.3f}" in table


@pytest.mark.slow
def test_single_model_has_no_ratio(folders: list[Path], tmp_path: Path) -> None:
    result = measure_models([str(folders[0])], prompt_tokens=[3], new_tokens=2, repeats=1, threads=1)
    assert "ratio" not in latency_table(result)
    plot_latency(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


@pytest.mark.slow
def test_a_worker_that_dies_is_an_error_that_names_its_model(folders: list[Path]) -> None:
    worker = Worker(str(folders[0]), threads=1, device="cpu")
    worker._process.kill()  # as the system does when memory runs out
    worker._process.wait()
    with pytest.raises(YunminError, match=r"compact: the measuring process ended with status -9"):
        worker.measure(3, 2)
    worker.kill()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m", "--repeats", "0"], "--repeats: must be >= 1, got 0"),
        (["m", "--new-tokens", "1"], "--new-tokens: must be >= 2, got 1"),
        (["m", "--prompt-tokens", "a"], "--prompt-tokens: must be integers separated by commas, got 'a'"),
        (["m", "--prompt-tokens", "0"], "--prompt-tokens: must be positive and distinct, got '0'"),
    ],
)
def test_impossible_settings_end_with_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "latency", *arguments]) == 1
    assert capsys.readouterr().err == f"yunmin: error: {message}\n"


@pytest.mark.slow
def test_missing_model_ends_with_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "latency", str(tmp_path / "none"), "--out", str(tmp_path)]) == 1
    captured: Any = capfd.readouterr()
    assert captured.err == (
        f"yunmin: error: {tmp_path / 'none'}: expected a checkpoint folder or a Hub id, found no such folder\n"
    )
    assert not (tmp_path / "latency.json").exists()


def test_bench_lists_what_it_can_measure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 2
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "--help"])
    assert stopped.value.code == 0
    assert "latency" in capsys.readouterr().out
