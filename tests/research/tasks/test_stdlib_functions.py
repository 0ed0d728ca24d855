"""Problems made of Python's own library."""

from __future__ import annotations

import ast
import enum
import heapq
import inspect
import pickletools
import secrets
import statistics

import pytest

from research.sandbox.runner import Sandbox
from research.tasks.code import judge_all, score
from research.tasks.problem import Problem
from research.tasks.stdlib_functions import stdlib_problems


@pytest.fixture(scope="module")
def problems() -> dict[str, Problem]:
    modules = (enum, heapq, pickletools, secrets, statistics)
    found = stdlib_problems({inspect.getsource(module) for module in modules})
    assert {problem.task_id.partition(".")[0] for problem in found} == {module.__name__ for module in modules}
    return {problem.task_id: problem for problem in found}


def test_prompts_and_own_bodies_are_programs() -> None:
    problems = stdlib_problems()
    assert len(problems) > 40
    for problem in problems:
        assert problem.canonical_solution
        function = ast.parse(problem.prompt + problem.canonical_solution).body[-1]
        assert isinstance(function, ast.FunctionDef)
        assert function.name == problem.entry_point
        head = ast.parse(problem.prompt).body[-1]  # with its docstring for a body
        assert isinstance(head, ast.FunctionDef)
        assert ast.get_docstring(head) == ast.get_docstring(function)
        assert len(head.body) == 1


def test_a_prompt_has_what_its_function_needs_and_no_more(problems: dict[str, Problem]) -> None:
    prompt = problems["statistics.median_low"].prompt
    assert "class StatisticsError(ValueError)" in prompt
    assert "def median_low(data):" in prompt
    assert "def median_high" not in prompt
    assert "import" not in prompt
    assert "import struct\n" not in problems["statistics.median"].prompt
    assert "import sys\n" not in problems["pickletools.read_uint1"].prompt


def test_the_own_body_passes_and_another_does_not(problems: dict[str, Problem], sandbox: Sandbox) -> None:
    median, reader = problems["statistics.median_low"], problems["pickletools.read_uint2"]
    programs = {
        (median, "    return sorted(data)[(len(data) - 1) // 2]\n"): True,
        (median, "    return sorted(data)[len(data) // 2]\n"): False,
        (median, "    pass\n"): False,
        (reader, reader.canonical_solution or ""): True,
        (reader, '    return int.from_bytes(f.read(2), "big")\n'): False,
    }
    verdicts = judge_all(list(programs), sandbox, "programs")
    assert {program: verdict.passed for program, verdict in verdicts.items()} == programs


def test_what_cannot_be_judged_here_does_not_count(problems: dict[str, Problem], sandbox: Sandbox) -> None:
    # random tokens, arguments that are functions, and examples that pass with any body
    names = ("statistics.median_low", "secrets.token_hex", "heapq.merge", "enum._test_simple_enum")
    asked = [problems[name] for name in names]
    result, _ = score(asked, [["    return sorted(data)[0]\n"]] * len(asked), sandbox)
    assert (result["problems"], result["unsolvable"], result["pass@1"]) == (1, len(asked) - 1, 0.0)
