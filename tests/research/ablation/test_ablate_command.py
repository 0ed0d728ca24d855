"""`yunmin ablate` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.models import write_model
from tests.research.ablation.fakes import FAILING, TINY, made_up_runs, write_texts
from yunmin.cli import main
from yunmin.tokenizer import Tokenizer

__all__ = ["made_up_runs"]


@pytest.fixture
def tiny(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a study that costs nothing, in the current folder."""
    monkeypatch.chdir(tmp_path)
    model = write_model(tmp_path / "model", tokenizer=tokenizer)
    texts = write_texts(tmp_path / "documents")
    keys = ("sequence_length", "batch_size", "max_steps", "validation_tokens")
    options = ["--checkpoint", str(model), "--data", str(texts), "--set", *(f"{key}={TINY[key]}" for key in keys)]
    return ["ablate", *options, "--seeds", "2", "--workers", "1", "--disable-visualization"]


def test_research_is_864_experiments_per_seed_at_108_points(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert main([*tiny, "--mode", "research", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "8 combinations of the pillars x 108 points = 864 experiments per seed, 2 seeds" in text
    assert "1,728, of which 520 differ; 520 are to be done" in text
    assert "share {0.2, 0.3, 0.4, 0.6} = 108 points" in text
    assert "about " in text
    assert main([*tiny, "--mode", "research", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["grid_points"], plan["planned_per_seed"], plan["distinct"], plan["steps"]) == (108, 864, 520, 12)
    assert plan["estimated_seconds"] > 0
    assert sorted(tmp_path.rglob("*")) == before


def test_a_study_leaves_its_report_and_goes_on_where_it_was(
    tiny: list[str], tmp_path: Path, made_up_runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*tiny, "--disable-grid-search", "--project", "mine", "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    folder = Path(outcome["output"])
    assert folder.name.startswith("research_outputs_")
    assert (outcome["planned"], outcome["distinct"], outcome["failed"]) == (16, 16, 0)
    assert {"RESEARCH_REPORT.md", "comprehensive_results.json", "results.csv", "report.html"} <= {
        path.name for path in folder.iterdir()
    }
    everything = json.loads((folder / "comprehensive_results.json").read_text())
    assert everything["settings"]["project"] == "mine"
    assert len(everything["results"]) == len(made_up_runs) == 16
    assert all(result["latency"]["decode_ms"] > 0 for result in everything["results"])
    assert main(["ablate", "--resume", str(folder), "--seeds", "3", "--workers", "1", "--disable-visualization"]) == 0
    assert len(made_up_runs) == 24
    assert "8 are to be done" in capsys.readouterr().err


def test_a_study_with_a_failed_experiment_is_reported_and_ends_with_status_1(
    tiny: list[str], tmp_path: Path, made_up_runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    FAILING.append("scan, seed 1")
    assert main([*tiny, "--disable-grid-search", "--output", "out"]) == 1
    captured = capsys.readouterr()
    assert "scan, seed 1: failed: TrainingError: the loss is nan" in captured.err
    assert captured.out.strip() == str(tmp_path / "out" / "RESEARCH_REPORT.md")
    assert "the loss is nan" in (tmp_path / "out" / "RESEARCH_REPORT.md").read_text()
    FAILING.clear()
    assert main([*tiny, "--disable-grid-search", "--output", "out"]) == 0
    assert len(made_up_runs) == 16 + 1


def test_a_search_takes_the_place_of_the_grid(
    tiny: list[str], tmp_path: Path, made_up_runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    assert main([*tiny, "--search", "optuna", "--trials", "9", "--output", "out", "--tensorboard"]) == 0
    assert "9 trials with Optuna instead of the grid, each with 2 seeds" in capsys.readouterr().err
    assert 8 * 2 <= len(made_up_runs) <= 9 * 2
    assert (tmp_path / "out" / "tensorboard").is_dir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["--trials", "3"], "--trials are of a search: expected --search optuna with it"),
        (["--resume", "none"], "none: expected the folder of a study, found no settings.json"),
        (["--resume", "a", "--output", "b"], "--resume names the folder already: expected no --output"),
        (
            ["--output", "documents"],
            "documents: expected a new folder or that of a study, found no settings.json in it",
        ),
        (["--set", "peft_r=3"], "--set peft_r: the grid decides it"),
        (["--grid", "sparsity=a"], "--grid sparsity=a: expected KEY=NUMBER,NUMBER"),
        (["--data", "none.txt"], "none.txt: expected a text file, a .jsonl file or a folder"),
        (["--checkpoint", "./none"], "none: expected a checkpoint folder or a Hub id, found no such folder"),
    ],
)
def test_bad_input_ends_with_one_line(
    arguments: list[str], message: str, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    keeps = tiny if arguments[0] != "--resume" else ["ablate"]
    assert main([*keeps, *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"yunmin: error: {message}")
    assert error.count("\n") == 1


def test_another_mode_is_another_study(
    tiny: list[str], made_up_runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*tiny, "--disable-grid-search", "--seeds", "1", "--output", "out"]) == 0
    capsys.readouterr()
    assert main(["ablate", "--resume", "out", "--mode", "research"]) == 1
    assert capsys.readouterr().err == "yunmin: error: --mode research: out is a study in mode pilot\n"
