"""The report of an ablation."""

from __future__ import annotations

import csv
import html
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from research.ablation import plots
from research.ablation.conclusions import conclude
from research.ablation.plots import PLOTS, draw_plots
from research.ablation.report import write_report
from research.reports.document import Block, Bullets, Heading, Paragraph, Table, to_markdown
from tests.research.ablation.studies import made_up
from yunmin.errors import MissingExtraError

SMALL = {"rank": (4, 8), "tau": (0.5,), "sparsity": (0.3, 0.5), "share": (0.4,)}
SETTINGS = {"project": "<b>demo</b>", "mode": "pilot", "command": ["yunmin", "ablate"], "grid": {"rank": [4, 8]}}
FAILED = {
    "combination": "peft",
    "point": {"rank": 4, "share": 0.4},
    "seed": 9,
    "error": "TrainingError: <script>alert(1)</script> | *loss*\nis nan",
}


def _written(folder: Path, results: list[dict[str, Any]], *, with_plots: bool = False) -> tuple[str, str]:
    """The Markdown and the HTML."""
    write_report(folder, results, SETTINGS, plots=with_plots)
    return (folder / "RESEARCH_REPORT.md").read_text("utf-8"), (folder / "report.html").read_text("utf-8")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    results = made_up(seeds=4, grid=SMALL)
    results[0]["test"]["word_perplexity"] = float("inf")
    _written(folder, [*results, FAILED])
    return folder


def test_report_names_effects_with_intervals_and_corrected_p_values(study: Path) -> None:
    text = (study / "RESEARCH_REPORT.md").read_text("utf-8")
    assert re.search(
        r"Against the baseline, float32 .* masking \+\d+\.\d % \[\+\d+\.\d %, \+\d+\.\d %\], p <?0\.0\d+", text
    )
    assert re.search(
        r"The best Pareto point by the score, within 5 % of the baseline's perplexity on the validation text, is "
        r"(scan\+)?peft \(rank 4",
        text,
    )
    assert "no significant interaction of pillars" in text


def test_report_says_where_nothing_is_significant(tmp_path: Path) -> None:
    text, _ = _written(tmp_path, made_up(seeds=4, effects={}, grid=SMALL))
    assert "Nothing is significant: none of " in text
    assert "changes significantly" not in text


def test_report_of_one_seed_says_that_nothing_is_tested(tmp_path: Path) -> None:
    text, _ = _written(tmp_path, made_up(seeds=1, grid=SMALL))
    assert (
        "Nothing is tested: a test needs pairs of experiments in several seeds that differ, and there is 1 seed."
        in text
    )
    assert "not tested" in text


def test_experiments_that_compute_the_same_are_called_identical(tmp_path: Path) -> None:
    results = made_up(seeds=3, grid=SMALL)
    named = {(r["combination"], str(r["point"]), r["seed"]): r for r in results}
    for (combination, point, seed), result in named.items():
        if combination == "scan":
            same = named["baseline", point, seed]["test"]["token_perplexity"]
            result["test"] = {"token_perplexity": same * (1 + 1e-7 * seed)}
    text, _ = _written(tmp_path, results)
    assert "; no difference at all: scan." in text
    assert "| scan | float32 | 0 % | [0 %, 0 %] | – | – | – | – | – | 3 | 3 | identical |" in text


def test_an_order_that_was_never_learned_is_named(tmp_path: Path) -> None:
    results = made_up(seeds=2, grid=SMALL)
    for result in results:
        if result["combination"] == "scan+peft":
            correlation = result["layers"]["scan_correlation"]
            correlation["after"] = correlation["before"]
    text, _ = _written(tmp_path, results)
    assert "No order was learned in scan+peft: channels stayed as they started." in text


def test_report_without_a_finished_experiment_says_so(tmp_path: Path) -> None:
    for results in ([], [FAILED]):
        text, page = _written(tmp_path, results)
        assert "No experiment finished" in text
        assert "No experiment finished" in page


def test_both_reports_say_the_same(study: Path) -> None:
    text = MarkdownIt().enable("table").render((study / "RESEARCH_REPORT.md").read_text("utf-8"))
    page = (study / "report.html").read_text("utf-8").partition("<body>")[2].partition("<script>")[0]
    for tags in (("h1", "h2", "h3"), ("li",), ("th", "td")):
        both = [
            [html.unescape(found) for found in re.findall(rf"<(?:{'|'.join(tags)})\b[^>]*>(.*?)</", source)]
            for source in (text, page)
        ]
        assert both[0] == both[1]
        assert both[0]


def test_page_needs_nothing_else_and_runs_nothing_else(study: Path) -> None:
    page = (study / "report.html").read_text("utf-8")
    assert "&lt;b&gt;demo&lt;/b&gt;" in page
    assert "<script>alert" not in page
    assert "default-src 'none'" in page
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,)', page) == []


def test_plots_are_in_the_page_and_beside_the_text(tmp_path: Path) -> None:
    text, page = _written(tmp_path, made_up(seeds=2, grid=SMALL), with_plots=True)
    assert {*re.findall(r"\]\(plots/(.*?)\)", text)} == {plot.file for plot in PLOTS}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {plot.file for plot in PLOTS}
    assert page.count("data:image/png") == len(PLOTS)


def test_report_without_plots_says_so(study: Path) -> None:
    text = (study / "RESEARCH_REPORT.md").read_text("utf-8")
    assert text.count("Not drawn: plots were not asked for.") == len(PLOTS)


def test_failed_experiments_are_listed(study: Path) -> None:
    text = (study / "RESEARCH_REPORT.md").read_text("utf-8")
    assert (
        r"| peft (rank 4, share 0.4), seed 9 | TrainingError: \<script>alert(1)\</script> \| \*loss\* is nan |" in text
    )


def test_files_for_programs_hold_everything(study: Path) -> None:
    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    found = json.loads((study / "comprehensive_results.json").read_text("utf-8"), parse_constant=refuse)
    assert found["settings"] == SETTINGS
    assert len(found["results"]) == 4 * (2 + 2 * 2 + 2 * 2 + 2 * 4) + 1
    assert found["conclusions"]["correction"] == "Holm"
    assert found["conclusions"]["sentences"]
    assert found["results"][0]["test"]["word_perplexity"] is None
    with (study / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found["results"])
    assert float(rows[0]["test_perplexity"]) == found["results"][0]["test"]["token_perplexity"]
    assert rows[-1]["error"] == FAILED["error"]
    assert {row["tau"] for row in rows if row["combination"] == "baseline"} == {""}


def test_plots_are_drawn_or_their_absence_is_explained(tmp_path: Path) -> None:
    missing = dict.fromkeys(("layers", "cost", "latency", "trainable_parameters", "adapted_parameters"))
    bare = [result | missing for result in made_up(seeds=1, grid=SMALL)]
    reasons = draw_plots(tmp_path, conclude([r for r in bare if r["combination"] in ("baseline", "scan")]))
    assert {name for name, reason in reasons.items() if reason} == {
        "efficiency_surface", "parameter_impacts", "sparsity_by_layer", "allocation_maps", "scan_correlation",
        "pareto_fronts",
    }  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"pillar_effects.png"}


def test_a_free_search_is_plotted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = [r for r in made_up(seeds=1) if r["combination"] in ("baseline", "all")]
    for index, result in enumerate(results):
        result["point"] = {key: value + index / 1000 for key, value in result["point"].items()}
    monkeypatch.setattr(plots, "PLOTS", [p for p in PLOTS if p.name in ("efficiency_surface", "sparsity_by_layer")])
    assert draw_plots(tmp_path, conclude(results)) == {"efficiency_surface": "", "sparsity_by_layer": ""}


def test_the_same_study_gives_the_same_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "PLOTS", PLOTS[:1])
    conclusions = conclude(made_up(seeds=2, grid=SMALL))
    for name in ("a", "b"):
        draw_plots(tmp_path / name, conclusions)
    first, second = ((tmp_path / name / PLOTS[0].file).read_bytes() for name in ("a", "b"))
    assert first == second


@pytest.mark.parametrize(("package", "purpose"), [("scipy", "testing differences"), ("matplotlib", "drawing plots")])
def test_missing_packages_are_named(
    package: str, purpose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=f"{purpose}.*'{package}'.*research"):
        write_report(tmp_path, made_up(seeds=2, grid=SMALL), SETTINGS, plots=True)


@settings(deadline=None)  # a busy machine is no error
@given(st.text(alphabet="ab1 *_`[]()<>|\\&;#+-.!~$:=/\n", min_size=1, max_size=30).filter(str.strip))
@example("1 #")  # the end of a heading
def test_no_text_is_taken_for_markup(text: str) -> None:
    line = " ".join(text.split())
    blocks: list[Block] = [Heading(2, text), Paragraph(text), Bullets([text]), Table((text,), [(text,)])]
    page = MarkdownIt().enable(["table", "strikethrough"]).render(to_markdown(blocks))
    for tag in ("h2", "p", "li", "th", "td"):
        found = re.findall(rf"<{tag}(?: [^>]*)?>(.*?)</{tag}>", page, flags=re.DOTALL)
        assert [html.unescape(inner) for inner in found] == [line]
