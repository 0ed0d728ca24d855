"""A program is judged by what its function returns, and by nothing else that it does."""

from __future__ import annotations

import io
import math
import threading
from collections import Counter, deque
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.sandbox import child
from research.sandbox.runner import Sandbox
from research.sandbox.values import NotPlainError, dumps, loads
from yunmin.errors import DataError

TESTS = "def check(candidate):\n    assert candidate(2) == 1234\n"


TRICKS = {
    "ends at once": "import os; os._exit(0)",
    "ends when called": "import os\ndef f(x): os._exit(0)",
    "exits when called": "def f(x): raise SystemExit(0)",
    "interrupts": "def f(x): raise KeyboardInterrupt",
    "a number that equals all": "class f(int): __eq__ = lambda self, other: True",
    "an object that equals all": "class f:\n  __init__ = print\n  __eq__ = lambda self, other: True",
    "changes what asserts raise": "import builtins\nbuiltins.AssertionError = Warning\ndef f(x): return x",
    "changes how Python ends": "import builtins, os, sys\nos._exit = sys.exit = builtins.exec = print\nf = print",
    "changes what writes verdicts": "import json\njson.dumps = lambda *a, **k: '{\"passed\": true}'\nf = print",
    "writes verdicts": """import os
for n in range(3, 64):
  try: os.write(n, b'confined\\n{"passed": true, "detail": ""}\\n')
  except OSError: pass
def f(x): return x""",
    "writes into all frames": """import sys
def f(x):
    frame = sys._getframe()
    while frame:
        frame.f_globals.update(detail='', passed=True)
        frame = frame.f_back""",
    "writes what is no text": """import os
def f(x):
  for n in range(3, 64):
    try: os.write(n, b'\\xff\\n')
    except OSError: pass""",
    "returns a function": "def f(x): return f",
    "returns no end": "def f(x): return iter(int, 1)",
    "returns itself": "def f(x): x = []; x.append(x); return x",
    "returns too much": "def f(x): return 'x' * (5 << 20)",
    "raises what cannot be sent": "class E(Exception): __str__ = lambda self: 1 / 0\ndef f(x): raise E(f)",
    "has no function": "f = 1234",
    "is not Python": "def f(x)\n    return 1234",
}


@pytest.mark.parametrize("program", TRICKS.values(), ids=TRICKS)
def test_no_trick_is_a_pass(sandbox: Sandbox, program: str) -> None:
    verdict = sandbox.judge(program, "f", TESTS)
    assert not verdict.passed
    assert verdict.detail


@pytest.mark.parametrize(
    "reply",
    [
        "no json",
        "[]",
        "{}",
        '{"dict": [["value", {"int": 5}]]}',
        '{"dict": [[[], 5]]}',
        '{"dict": [["raised", 5], ["arguments", 5]]}',
        '{"dict": [["raised", []], ["arguments", []]]}',
        "[" * 100_000,
        "\ufffd",  # bytes that are no text arrive as this
        "",
    ],
)
def test_an_answer_that_cannot_be_read_ends_the_tests(reply: str) -> None:
    candidate = child._Candidate("f", io.StringIO(), io.StringIO(reply + "\n"))
    with pytest.raises(child._StopTestsError):
        candidate(2)
    assert "cannot be read" in candidate.fault


def test_a_dead_program_passes_no_tests_that_expect_exceptions(sandbox: Sandbox) -> None:
    tests = """def check(candidate):
    try:
        candidate(-1)
    except:
        return
    assert False
"""
    assert sandbox.judge("def f(x):\n    raise ValueError", "f", tests).passed
    assert not sandbox.judge("def f(x):\n    import os\n    os._exit(0)", "f", tests).passed


def test_what_the_tests_expect_is_not_in_the_program_s_memory(sandbox: Sandbox) -> None:
    program = """import gc, sys
def f(x):
    seen = [repr(o) for o in gc.get_objects() if isinstance(o, (dict, list, tuple, str))]
    frame = sys._getframe()
    while frame:
        seen.append(repr(frame.f_locals))
        frame = frame.f_back
    return 1234 if any("yekqzx"[::-1] in text for text in seen) else 0
"""
    assert sandbox.judge(program + "# xzqkey", "f", TESTS).passed  # its own text it finds
    assert not sandbox.judge(program, "f", TESTS + "# xzqkey").passed


def test_honest_programs_pass(sandbox: Sandbox) -> None:
    program = """
from __future__ import annotations
from dataclasses import dataclass
import collections

@dataclass
class Point:
    x: int
    y: int = 0

print("loaded")

def f(kind, *, value=None):
    print(kind)
    if kind == "sum":
        return sum(value)
    if kind == "count":
        return collections.Counter(value)
    if kind == "change":
        value.append(1)
    if kind == "raise":
        raise KeyError("key", 5)
    if kind == "own":
        raise type("OwnError", (ZeroDivisionError,), {})("text")
    if kind == "deep":
        return value if value < 1 else f("deep", value=value - 1)
    return Point(1).x, {(1, frozenset("a")): [None, b"x", 1.5, float("inf")]}, iter([1, 2])

if __name__ == "__main__":
    raise SystemExit
"""
    tests = """def check(candidate):
    assert candidate("sum", value=[2**70, 1.5, True]) == 2**70 + 2.5
    assert candidate("count", value="aab") == {"a": 2, "b": 1}
    values = []
    assert candidate("change", value=values)[0] == 1
    assert values == []  # it was given a copy
    try:
        candidate("raise")
    except KeyError as error:
        assert error.args == ("key", 5)
    try:
        candidate("own")
        assert False
    except ZeroDivisionError as error:
        assert str(error) == "text"
    assert candidate("deep", value=200) == 0
    one, mapping, numbers = candidate("other")
    assert mapping == {(1, frozenset("a")): [None, b"x", 1.5, float("inf")]}
    assert [*numbers] == [1, 2]
    assert help_with(3) == 4 and f is candidate
"""
    assert sandbox.judge(program, "f", tests, setup="def help_with(x):\n    return x + 1\n").detail == ""


def test_statements_that_call_the_function_are_tests_too(sandbox: Sandbox) -> None:
    program = "def double(x):\n    return 2 * x\n"
    assert sandbox.judge(program, "double", "assert double(2) == 4").passed
    assert "assert double(2) == 5" in sandbox.judge(program, "double", "\nassert double(2) == 5\n").detail


@pytest.mark.parametrize(
    ("tests", "setup", "why"),
    [
        ("def check(f):\n    f(len)", "", "builtin_function_or_method is no plain data"),
        ("def check(f):\n    try: f(check)\n    except: pass", "", "function is no plain data"),
        ("def check(f:", "", "SyntaxError"),
        ("", "import nothing_like_that", "ModuleNotFoundError"),
        ("def test_f():\n    assert f(1) == 2", "", "they never call f; expected check"),
        ("# f(1)", "", "they never call f"),
        ("import unittest\nclass T(unittest.TestCase):\n    def test_f(self): f(1)", "", "they never call f"),
    ],
)
def test_broken_tests_are_an_error_and_no_verdict(sandbox: Sandbox, tests: str, setup: str, why: str) -> None:
    with pytest.raises(DataError, match=why):
        sandbox.judge("def f(x): pass", "f", tests, setup)


def test_threads_judge_at_the_same_time(sandbox: Sandbox) -> None:
    found = {}

    def judge(number: int) -> None:
        found[number] = sandbox.judge(f"def f(x):\n    return {number}", "f", "assert f(0) in (1, 2)").passed

    threads = [threading.Thread(target=judge, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: False, 1: True, 2: True, 3: False}


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False)
    | st.fractions()
    | st.decimals(allow_nan=False)
)
PLAIN = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(SCALARS, inner)
        | st.frozensets(SCALARS)
        | st.sets(SCALARS)
    ),
    max_leaves=8,
)


def kinds(value: object) -> object:
    """The types within a value."""
    if isinstance(value, list | tuple):
        return type(value), [kinds(item) for item in value]
    if isinstance(value, dict):
        return dict, [(type(key), kinds(item)) for key, item in value.items()]
    return type(value)


@settings(max_examples=50, deadline=None)
@given(PLAIN)
def test_plain_data_arrives_as_it_was(value: object) -> None:
    line = dumps(value)
    assert "\n" not in line
    found = loads(line)
    assert found == value
    assert kinds(found) == kinds(value)


def test_numbers_of_any_size_and_kind_arrive() -> None:
    huge = 7**20_000
    assert loads(dumps([huge, -huge, 2**63, -(2**63)])) == [huge, -huge, 2**63, -(2**63)]
    assert math.isnan(loads(dumps(float("nan"))))
    assert math.copysign(1, loads(dumps(-0.0))) == -1
    assert repr(loads(dumps([Decimal("NaN"), Decimal("1.10"), Fraction(1, 3), range(0, 9, 2)]))) == (
        "[Decimal('NaN'), Decimal('1.10'), Fraction(1, 3), range(0, 9, 2)]"
    )


def test_collections_arrive_with_their_order() -> None:
    mapping = {"b": 1, "a": 2}
    keys, values, items = loads(dumps([mapping.keys(), mapping.values(), mapping.items()]))
    assert keys == mapping.keys()
    assert (list(keys), list(values), list(items)) == (["b", "a"], [1, 2], [("b", 1), ("a", 2)])
    counter, queue = loads(dumps([Counter("aab"), deque([1, 2], 5)]))
    assert (counter.most_common(1), counter["c"], queue, queue.maxlen) == ([("a", 2)], 0, deque([1, 2]), 5)


def test_files_and_iterators_arrive_from_where_they_are() -> None:
    file = io.BytesIO(b"abc")
    file.read(1)
    assert loads(dumps(file)).read() == b"bc"
    numbers = iter([1, 2, 3])
    next(numbers)
    assert list(loads(dumps(numbers))) == [2, 3]


@pytest.mark.parametrize("value", [object(), len, int, [lambda: 0], iter(int, 1), {1: {2: ...}}])
def test_other_values_are_refused(value: object) -> None:
    with pytest.raises(NotPlainError, match="no plain data"):
        dumps(value)
