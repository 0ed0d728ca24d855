"""What the comparisons say of numbers whose meaning is known, and one run from text to page."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from research.pillars import runner
from research.pillars.__main__ import COMPARISONS, main
from research.pillars.adapters import WAYS
from research.pillars.masking import CUTS, RANKINGS
from research.pillars.pipeline import WAYS as PIPELINES
from research.pillars.rates import search_rate
from research.pillars.report import page, update_section
from research.pillars.scan_orders import EFFECTS, ORDERS, kept_in_blocks
from research.pillars.summary import compared, said
from research.reports.document import to_markdown
from research.studies.experiments import Experiment
from research.studies.jobs import run_here
from yunmin.cli import run
from yunmin.errors import DataError, TrainingError

SETTINGS: dict[str, Any] = {
    "size": "2m",
    "parameters": 2_000_000,
    "seeds": 3,
    "base_text": "stdlib (01234567)",
    "text": "stdlib (01234567)",
    "base_steps": 600,
    "base_batch": 16,
    "steps": 300,
    "batch": 8,
    "window": 256,
    "test_tokens": 32768,
    "adapts": True,
}
NOISE = (1.0, 1.01, 0.995)


def _values(level: float, spread: float = 0.02) -> list[float]:
    """Perplexities of three seeds: seeds differ by more than methods, methods by not quite the same in each."""
    return [level * noise + spread * number for number, noise in enumerate(NOISE)]


def _found(name: str) -> dict[str, Any]:
    """A result in which every method is worse than the one before it."""
    found: dict[str, Any] = {"settings": SETTINGS}
    match name:
        case "scan_orders":
            of_effect = {order: _values(20 + n / 2, 0.02 * (n > 0)) for n, order in enumerate(ORDERS)}
            found |= {"exact": _values(19), "retained": {order: [0.75, 0.76, 0.77] for order in ORDERS}}
            found |= {text: dict.fromkeys(EFFECTS, of_effect) for text in ("tuning", "test")}
            found["single"] = {"blocks, 25 % cut": _values(19.5)}
            found["fitted"] = {"blocks, 25 % cut": _values(19.0)}
        case "masking":
            of_cut = {r: {"before": _values(40 + n), "after": _values(20 + n, n / 50)} for n, r in enumerate(RANKINGS)}
            found |= {"dense": _values(18), "perplexity": dict.fromkeys(CUTS, of_cut)}
            found["cut"] = {cut: [0.5, 0.0] for cut in CUTS}
        case "adapters":
            found["perplexity"] = {way: _values(30 + n, n / 50) for n, way in enumerate(WAYS)}
            found |= {"rate": dict.fromkeys(WAYS, 1e-3), "trainable": dict.fromkeys(WAYS, 1000)}
            found["trainable"]["full fine-tuning"] = 100_000
        case _:
            stored = ("float32", "int8", "int4")
            found["perplexity"] = {
                p: {way: _values(30 + 3 * n, n / 50) for n, way in enumerate(PIPELINES)} for p in stored
            }
            cost = {"weight_bytes": 8_000_000, "state_bytes": 10_000}
            found |= {"rate": dict.fromkeys(PIPELINES, 1e-3), "trainable": {way: {"dense": 1000} for way in PIPELINES}}
            found |= {"cost": {p: dict.fromkeys(PIPELINES, cost) for p in stored}, "threads": 1, "cpu": "a processor"}
            found["timing"] = {
                f"{way}, {p}": {"prefill_ms": 4.0, "decode_ms": 0.5} for way in PIPELINES for p in stored
            }
    return found


CLAIMS = {
    "scan_orders": "lowest on the tuning text is as trained; correlation order worse than the order as trained (+5.1 %",
    "masking": "50 % of channels: learned gates, started alike worse than learned gates (",
    "adapters": "hybrid by spectrum better than uniform LoRA (",
    "pipeline": "float32: three pillars, 25 % cut worse than dense fine-tuning (+10.1 %",
}


@pytest.mark.parametrize("name", COMPARISONS.values())
def test_a_page_says_in_words_what_its_numbers_say(name: str) -> None:
    text = to_markdown(page(name, _found(name), "plot.png"))
    assert CLAIMS[name] in text.replace("−", "-").replace("\\", ""), text


@pytest.mark.parametrize("name", COMPARISONS.values())
def test_a_section_is_renewed_with_its_plot_and_the_rest_stays(tmp_path: Path, name: str) -> None:
    document = tmp_path / "pillars.md"
    document.write_text(f"before\n<!-- begin {name} -->\nold\n<!-- end {name} -->\nafter\n")
    for _ in range(2):
        update_section(document, name, _found(name), name)
    lines = document.read_text().splitlines()
    assert (lines[0], lines[-1], "old" in lines) == ("before", "after", False)
    assert f"(pillars/{name}.png)" in document.read_text()
    assert (tmp_path / "pillars" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_document_without_the_section_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("nothing here\n")
    with pytest.raises(DataError, match="expected one line <!-- begin masking -->"):
        update_section(tmp_path / "other.md", "masking", _found("masking"), "masking")


def test_changes_are_paired_by_seed_and_corrected_for_all_tables() -> None:
    series = {"a": [20.0, 30.0, 40.0], "b": [21.0, 31.6, 42.1], "c": [19.0, 33.0, 40.5]}
    alone, b, c = compared({"": series}, "a")[""]
    assert alone.found is None
    ratios = [x / y for x, y in zip(series["b"], series["a"], strict=True)]
    assert b.found is not None
    assert b.found.change == pytest.approx(math.prod(ratios) ** (1 / 3) - 1)
    assert b.found.p_t is not None
    assert b.p == pytest.approx(2 * b.found.p_t)
    both = compared({"first": series, "second": {"a": series["a"], "b": series["b"]}}, "a")
    assert both["first"][1].p == pytest.approx(3 * b.found.p_t)
    assert both["first"][1].p == both["second"][1].p
    assert said(c, "c", "a").startswith("no significant difference between c and a (")


def test_one_seed_is_told_and_not_tested() -> None:
    line = compared({"": {"a": [20.0], "b": [21.0]}}, "a")[""][1]
    assert said(line, "b", "a") == "b against a: +5.0 %, not tested"


def test_rates_are_tried_beyond_the_end_where_the_best_lies() -> None:
    known: dict[float, float | None] = {}  # None where it diverged

    class Results:
        def result(self, experiment: Experiment) -> dict[str, Any] | None:
            perplexity = known.get(float(experiment.label))
            return None if perplexity is None else {"validation_perplexity": {"adapters": perplexity}}

        def failure(self, experiment: Experiment) -> str | None:
            return "the loss is nan" if known.get(float(experiment.label), 0.0) is None else None

    def search() -> tuple[list[float], float | None]:
        laboratory: Any = Results()
        tried, best = search_rate((0.01, 0.03), lambda rate: Experiment({}, label=f"{rate:g}"), laboratory)
        assert all(experiment.may_diverge for experiment in tried)
        return [float(experiment.label) for experiment in tried], best

    assert search() == ([0.01, 0.03], None)
    known |= {0.01: 5.0, 0.03: 4.0}
    assert search() == ([0.01, 0.03, 0.09], None)
    known[0.09] = 4.5
    assert search() == ([0.01, 0.03, 0.09], 0.03)
    known[0.09] = None
    assert search() == ([0.01, 0.03, 0.09], 0.03)
    known[0.01] = 3.0
    assert search() == ([0.01, 0.03, 0.003], None)
    known.update(dict.fromkeys((0.01, 0.03, 0.003, 0.001, 0.0003, 0.0001, 3e-5)))
    with pytest.raises(TrainingError, match="training diverges at every learning rate down to 3e-05"):
        search()


def test_whole_blocks_are_kept_in_the_order_of_their_channels() -> None:
    importance = torch.cat([torch.full((16,), value) for value in (3.0, 1.0, 4.0, 2.0)])
    assert kept_in_blocks(importance, 0.5).tolist() == [*range(16), *range(32, 48)]


@pytest.mark.parametrize("arguments", [["masking", "--seeds", "0"], ["masking", "--steps", "0"]])
def test_impossible_numbers_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(main, arguments) == 1
    assert f"{arguments[1]} must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.slow
def test_a_comparison_goes_from_text_to_page_and_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "run_in_workers", lambda jobs, laboratory, *_: run_here(jobs, laboratory))
    arguments = ["scan-order", "--size", "tiny", "--seeds", "2", "--base-steps", "12", "--base", "stdlib:reference"]
    arguments += ["--test-tokens", "512", "--output", str(tmp_path)]
    assert run(main, arguments) == 0
    first = capsys.readouterr()
    assert "2 experiments to run in 2 processes, from base tiny, seed 0 on" in first.err
    assert "[2/2] base tiny, seed 1: test perplexity" in first.err
    assert "| int4, to nearest | random |" in first.out
    assert run(main, arguments) == 0
    second = capsys.readouterr()
    assert second.out == first.out
    assert "perplexity" not in second.err
    assert {path.name for path in tmp_path.iterdir()} >= {
        "scan-order-tiny.md",
        "scan-order-tiny.json",
        "scan-order-tiny.png",
    }
