from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import serve
from benchmarks.contestant_files import Absent
from benchmarks.serve_models import served_artifact, served_shape
from benchmarks.serve_parts import Prompts
from benchmarks.serve_servers import llama_cpp_python, llama_server
from benchmarks.serve_soak import memory_growth
from benchmarks.serve_tables import plot_serve, serve_tables
from tests.models import write_model
from yunmin.errors import RequestError
from yunmin.tokenizer import Tokenizer

JSON = dict[str, Any]


def result(**changes: Any) -> JSON:
    """A whole result, with figures that nobody has measured."""
    sample = {"tokens_per_s": 900.0, "first_token_s": 0.1}
    parts = {
        "throughput": {
            "16": {
                "engine_tokens_per_s": 1000.0,
                "http_tokens_per_s": 900.0,
                "ratio": 0.9,
                "first_token_s": 0.1,
                "client_cpu_share": 0.02,
            }
        },
        "stall": {
            "streams": 8,
            "prompt_tokens": 4096,
            "median_before_s": 0.01,
            "p99_during_s": 0.02,
            "ratio": 2.0,
            "read_s": 3.0,
            "before_s": [0.01, 0.01],
            "during_s": [0.01, 0.02],
        },
        "prefix": {
            "prefix_tokens": 2048,
            "cold_s": 1.0,
            "second_s": 0.5,
            "hit_s": 0.1,
            "ratio": 10.0,
            "cached_tokens": 2048,
        },
        "sessions": {
            "sessions": 1000,
            "seconds": 30.0,
            "stored_bytes": 3e9,
            "session_tokens": 10_000,
            "restored_s": 0.05,
            "recomputed_s": 5.0,
            "ratio": 100.0,
        },
        "peers": {
            "new_tokens": 128,
            "servers": {
                "ours": {"16": sample},
                "llama-server": {"16": {"tokens_per_s": 90.0, "first_token_s": 0.4}},
            },
            "absent": {"llama-cpp-python": "not installed"},
        },
        "soak": {
            "minutes": 30,
            "counts": {"stream": 900, "session": 100},
            "failures": ["stream: it broke"],
            "alive": True,
            "memory_warm_bytes": 1e9,
            "memory_end_bytes": 1.02e9,
            "memory_growth": 0.02,
            "memory": [[0.0, 1e9], [1.0, 1.02e9]],
        },
    }
    whole: JSON = {
        "benchmark": "serve",
        "time": "2026-01-01T00:00:00+00:00",
        "machine": {"cpu": "a CPU", "cores_usable": 2, "load_average_1min": 0.5},
        "load_average_after": 1.5,
        "settings": {"new_tokens": 256, "threads": 2},
        "model": {"name": "130m int8"},
        "parts": parts,
        "failed": {},
    }
    return whole | changes


def test_tables_hold_every_part_beside_its_target() -> None:
    text = "\n".join(table.markdown() for table in serve_tables(result()))
    assert "| 16 | 1,000 | 900 | 0.900 | >= 0.85 | 100.0 | 2.0% |" in text
    assert "|   ratio | 2.00 | < 3 |" in text
    assert "| 1,000 sessions created and used once | 30.0 s | <= 60 s |" in text
    assert "|   ratio | 100 | >= 50 |" in text
    assert "| llama-server | 16 | 90.0 | 10.00 | 400 | 4.00 |" in text
    assert "- llama-cpp-python: not installed" in text
    assert "|   errors that were not intended | 1 | 0 |" in text
    assert "- stream: it broke" in text
    assert "|   memory at the end, growth | +2.0% | <= 5% |" in text
    assert "load 0.5 before and 1.5 after" in text


@pytest.mark.parametrize("kept", [[], ["stall"], ["peers", "soak"], list(result()["parts"])])
def test_parts_that_were_not_measured_are_left_out(kept: list[str], tmp_path: Path) -> None:
    some = result(parts={name: part for name, part in result()["parts"].items() if name in kept}, failed={"x": "why"})
    texts = [table.text() for table in serve_tables(some)]
    assert any("x: why" in text for text in texts)
    assert any("sessions created" in text for text in texts) == ("sessions" in kept)
    plot_serve(some, tmp_path / "serve.png")
    assert (tmp_path / "serve.png").stat().st_size > 0


def test_ratios_need_ours() -> None:
    whole = result()
    del whole["parts"]["peers"]["servers"]["ours"]
    text = "\n".join(table.markdown() for table in serve_tables(whole))
    assert "| llama-server | 16 | 90.0 |  | 400 |  |" in text


def test_memory_growth_compares_the_end_with_the_time_after_the_warm_up() -> None:
    rising = [(float(second), 1000 + 1000 * (second < 20) + second) for second in range(101)]
    found = memory_growth(rising)
    assert found["memory_warm_bytes"] == 1025
    assert found["memory_end_bytes"] == 1095
    assert found["memory_growth"] == pytest.approx(70 / 1025)
    assert memory_growth([])["memory_growth"] is None
    assert memory_growth([(0.0, 0), (1.0, 0)])["memory_growth"] is None  # a system that tells nothing


def test_prompts_are_as_long_as_asked_for_and_never_the_same(tokenizer: Tokenizer) -> None:
    prompts = Prompts(tokenizer, 300)
    drawn = [prompts.ids(16) for _ in range(50)]
    assert all(len(ids) == 16 and max(ids) < 300 for ids in drawn)
    assert len({tuple(ids[:8]) for ids in drawn}) == 50
    assert tokenizer.decode(drawn[0]).endswith("x")
    assert len({prompts.text() for _ in range(50)}) == 50


def test_a_shape_is_served_in_the_format_asked_for_with_a_tokenizer(tmp_path: Path) -> None:
    served = served_shape("tiny", "int8", tmp_path)
    assert json.loads((served.folder / "manifest.json").read_text())["quantization"] == "int8"
    assert (served.folder / "tokenizer.json").is_file()
    assert served.gguf().name == "Q8_0.gguf"
    made = served.gguf().stat().st_mtime_ns
    assert served_shape("tiny", "int8", tmp_path).gguf().stat().st_mtime_ns == made
    again = served_artifact(str(served.folder), tmp_path)
    assert again.format == "int8"
    with pytest.raises(Absent, match="int8 weights, and a GGUF file is made of float ones"):
        again.gguf()


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"ARTIFACT: .* has no tokenizer\.json"):
        served_artifact(str(write_model(tmp_path / "model")), tmp_path)


def test_missing_peers_are_named_with_what_would_help(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Absent, match="make peers builds it"), llama_server(tmp_path, tmp_path, threads=1, slots=1):
        pass
    monkeypatch.setattr("benchmarks.serve_servers.default_python", lambda _: sys.executable)
    with pytest.raises(Absent, match="make peers installs it"), llama_cpp_python(tmp_path, tmp_path, threads=1):
        pass


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "ARTIFACT: give a folder, or --shape"),
        (["a", "--shape", "tiny"], "ARTIFACT: give a folder, or --shape"),
        (["a", "--format", "int8"], "--format: an artifact is served as it is"),
        (["--shape", "tiny", "--format", "fp8"], "--format: expected one of fp32, int8, int4, found 'fp8'"),
        (["--shape", "tiny", "--only", "stall,x"], "--only: expected some of throughput, .*, found 'x'"),
        (["--shape", "tiny", "--soak", "nan"], "--soak: must be >= 0"),
        (["--shape", "tiny", "--threads", "0"], "--threads: must be >= 1, got 0"),
    ],
)
def test_impossible_options_are_named(argv: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=message):
        serve.main([*argv, "--out", str(tmp_path)])


@pytest.mark.slow
def test_the_command_measures_a_tiny_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--shape", "tiny", "--format", "fp32", "--quick", "--threads", "1", "--soak", "0.1", "--json"]
    status = serve.main([*asked, "--only", "throughput,stall,prefix,sessions", "--out", str(tmp_path)])
    found = json.loads(capsys.readouterr().out)
    assert found["failed"] == {}
    assert status == 0
    assert set(found["parts"]) == {"throughput", "stall", "prefix", "sessions", "soak"}
    assert found["parts"]["prefix"]["cached_tokens"] >= found["settings"]["prefix_tokens"]
    assert found["parts"]["soak"]["failures"] == []
    assert found["parts"]["soak"]["alive"]
    assert json.loads((tmp_path / "serve.json").read_text()) == found
    assert serve.main(["--report", str(tmp_path / "serve.json")]) == 0
    assert "### Tokens per second over HTTP" in capsys.readouterr().out
