"""`yunmin eval`, from its arguments to its figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

import research.models.remote
import yunmin
from research.models.server import Server
from tests.models import TEXT, trained_tokenizer, write_model
from tests.research.served import URL, served
from yunmin.cli import main

TOKENIZER = trained_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), tokenizer=TOKENIZER)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    record = {"context": "The quick brown fox jumps.", "answers": ["fox", "the brown fox"]}
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(record | {"question": f"Who is number {n}?"}) + "\n" for n in range(6)))
    return path


def result_of(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    status = main(["eval", *argv, "--json"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    result: dict[str, Any] = json.loads(captured.out)
    return result


def test_a_url_gives_the_figures_of_its_folder(
    folder: Path, questions: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = []

    def in_this_process(url: str, api_key: str | None, concurrency: int, _: Any) -> Server:
        keys.append(api_key)
        return Server(url, api_key, concurrency, httpx.ASGITransport(app))

    monkeypatch.setattr(research.models.remote, "Server", in_this_process)
    monkeypatch.setenv("MY_KEY", "secret-key")
    text = questions.with_name("text.txt")
    text.write_text(TEXT * 3)
    with served(yunmin.load(folder, device="cpu"), API_KEYS="secret-key") as app:
        for argv in (
            ["--task", "qa", "--data", str(questions), "--few-shot", "2", "--limit", "3", "--max-new-tokens", "5"],
            ["--task", "perplexity", "--data", str(text), "--window", "64", "--stride", "32"],
        ):
            here = result_of(capsys, str(folder), *argv)
            there = result_of(capsys, URL, *argv, "--api-key-env", "MY_KEY")
            assert (here.pop("model"), there.pop("model")) == (str(folder), URL)
            assert here.pop("intervals").keys() == there.pop("intervals").keys()
            for name, value in here.items():
                assert there[name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value)
        assert main(["eval", URL, "--data", str(text)]) == 1
    error = capsys.readouterr().err
    assert (
        error == "yunmin: error: http://test/v1/models: status 401: an API key is needed: Authorization: Bearer KEY\n"
    )
    assert keys == ["secret-key", "secret-key", None]


def test_figures_are_shown_with_their_intervals(
    folder: Path, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["eval", str(folder), "--task", "qa", "--data", str(questions), "--max-new-tokens", "2"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "exact match              0.0000  [0.0000, 0.0000]\n" in out
    assert out.endswith("in brackets: 95% by bootstrap over 6 examples\n")


def test_intervals_are_of_documents_where_there_are_many(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {n} of many\n" * (1 + n % 3)}) + "\n" for n in range(40)))
    result = result_of(capsys, str(folder), "--data", str(path), "--window", "100")
    assert (result["intervals"]["resampled"], result["intervals"]["units"]) == ("documents", 40)
    for name in ("token_perplexity", "bits_per_byte", "byte_perplexity", "word_perplexity"):
        low, high = result["intervals"][name]
        assert low < result[name] < high
    few = result_of(capsys, str(folder), "--data", str(path), "--window", "100", "--max-tokens", "250")
    assert (few["intervals"]["resampled"], few["intervals"]["units"]) == ("windows", 3)
    assert few["byte_perplexity"] == pytest.approx(2 ** few["bits_per_byte"])


_CODE = ["--task", "code", "--data", "x"]


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        ([], 2, "the following arguments are required: --data"),
        (["--task", "qa", "--data", "x", "--window", "5"], 2, "--window: has no meaning with --task qa"),
        (["--task", "perplexity", "--data", "x", "--stemmer"], 2, "--stemmer: has no meaning with --task perplexity"),
        (["--lm-eval", "piqa", "--data", "x"], 2, "--data: has no meaning with --lm-eval"),
        (["--lm-eval", "piqa", "--task", "qa"], 2, "--task: has no meaning with --lm-eval"),
        (["--data", "x", "--batch-size", "0"], 1, "--batch-size: must be >= 1, got 0"),
        (["--task", "qa", "--data", "x", "--few-shot", "-1"], 1, "--few-shot: must be >= 0, got -1"),
        (["--task", "qa", "--data", "x", "--samples", "/none/out.jsonl"], 1, "--samples: expected a file in a folder"),
        (["--task", "qa", "--data", "x", "--samples", "/"], 1, "--samples: expected a file in a folder"),
        (["--lm-eval", ""], 2, "--lm-eval: expected names of tasks"),
        (["--data", "x", "--api-key-env", "KEY"], 2, "--api-key-env: has no meaning without a server's URL"),
        ([*_CODE, "--top-p", "0.5"], 2, "--top-p: has no meaning at temperature 0"),
        ([*_CODE, "--temperature", "nan"], 1, "temperature: must be a number"),
        ([*_CODE, "--seed", str(2**63 - 1)], 1, "--seed: must be <= 4294967295"),
        ([*_CODE, "--score-samples", "y", "--programs", "5"], 2, "--programs: has no meaning with --score-samples"),
    ],
)
def test_options_that_mean_nothing_are_refused_in_one_line(
    argv: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        found = main(["eval", "nowhere", *argv])
    except SystemExit as end:
        found = int(str(end.code))
    error = capsys.readouterr().err
    assert (found, error.count("\n")) == (status, 1)
    assert error.startswith(f"yunmin: error: {message}")


def test_a_server_has_a_device_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["eval", URL, "--data", "x", "--device", "cpu"])
    assert capsys.readouterr().err.startswith("yunmin: error: --device: has no meaning with a server's URL")
