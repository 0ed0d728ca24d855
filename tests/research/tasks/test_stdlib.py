"""Questions about Python sources have the answers that Python itself gives."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path

import pytest

from research.tasks.records import Example
from research.tasks.stdlib import docstring_examples, signature_examples

SOURCE = '''
import os

def first(a, b=1, *, c: "str" = 'x', d):
    """Does the first thing well.

    And more.
    """
    # a comment stays
    return a  # beside code

class Holder:
    @property
    async def second(self, value):
        r"""Second thing: \\d is no digit."""
        return value

    def only_a_docstring(self):
        """Nothing is left of this one."""

def on_one_line(): "Says nothing of use here."; return 1

def short(x, y):
    """Too short."""
    return x

def variadic(*args, key=None):
    return args

def twice(left, right):
    """The same function comes twice here."""
    return left
'''
AGAIN = SOURCE[SOURCE.index("def twice") :]


def asked(examples: list[Example]) -> dict[str, str]:
    """The signature's line by question."""
    return {e.fields["question"]: e.fields["context"].partition("\n")[0] for e in examples}


def test_a_function_without_its_docstring_is_summarized_by_its_first_line() -> None:
    examples = docstring_examples([SOURCE, "no Python (", AGAIN])
    found = {example.golds[0]: example.fields["document"] for example in examples}
    assert list(found) == [
        "Does the first thing well.",
        "The same function comes twice here.",
        "Second thing: \\d is no digit.",
    ]
    assert found["Does the first thing well."] == (
        "def first(a, b=1, *, c: \"str\" = 'x', d):\n    # a comment stays\n    return a  # beside code"
    )
    assert found["Second thing: \\d is no digit."].startswith("@property\nasync def second(self, value):\n    return")
    assert len({example.id for example in examples}) == len(examples)


def test_questions_are_about_plain_functions_of_two_parameters_or_more() -> None:
    lines = set(asked(signature_examples([SOURCE, AGAIN])).values())
    assert lines == {"def first(a, b=1, *, c: \"str\" = 'x', d):", "def short(x, y):", "def twice(left, right):"}


def test_long_functions_are_left_out() -> None:
    long = "def long(a, b):\n" + "    a = b  # and so on and on\n" * 100
    assert signature_examples([long]) == []


def test_every_kind_of_question_has_pythons_own_answer() -> None:
    """All functions of a module of the standard library, under many names, against `inspect.signature`."""
    namespace: dict[str, object] = {}
    kinds = set()
    for number in range(120):
        source = f"def f{number}(a, b, /, c=None, *, d=3, e='x y', g):\n    return {number}\n"
        exec(source, namespace)  # ours
        parameters = inspect.signature(namespace[f"f{number}"]).parameters  # type: ignore[arg-type]
        (example,) = signature_examples([source])
        words = example.fields["question"].rstrip("?").split()
        match words:
            case ["How", "many", *_]:
                expected: tuple[str, ...] = (str(len(parameters)), "six")
            case [*_, "first"]:
                expected = (next(iter(parameters)),)
            case [*_, "last"]:
                expected = (list(parameters)[-1],)
            case ["What", "is", "the", "default", "of", "the", "parameter", name, *_]:
                default = parameters[name].default
                expected = () if default is inspect.Parameter.empty else (repr(default),)
            case ["Which", *_, "has", "the", "default", "'x", "y'"]:
                expected = ("e",)
            case ["Which", *_, "default", value]:
                expected = tuple(n for n, p in parameters.items() if repr(p.default) == value)
            case _:
                pytest.fail(example.fields["question"])
        assert example.golds == expected
        kinds.add((words[0], words[1], words[-1] == "last", bool(expected)))
    assert len(kinds) >= 5


def test_real_sources_give_what_inspect_says() -> None:
    examples = docstring_examples([Path(textwrap.__file__).read_text(encoding="utf-8")])
    found = {example.golds[0] for example in examples}
    for function in (textwrap.dedent, textwrap.indent, textwrap.fill):
        assert (inspect.getdoc(function) or "").partition("\n")[0] in found


def test_a_functions_question_depends_on_nothing_beside_it() -> None:
    alone = signature_examples([AGAIN])
    assert alone[0] in signature_examples([SOURCE])
