"""Functions of Python's own library that a model completes, checked by the examples in their docstrings."""

from __future__ import annotations

import ast
import doctest
import sysconfig
from collections.abc import Container, Iterator
from functools import cache
from pathlib import Path
from symtable import symtable

from research.tasks.problem import Problem

# what is deprecated, belongs to an application, or has no functions that anyone would want to complete
_SKIPPED = frozenset(
    """__pycache__ antigravity.py asyncio dist-packages distutils idlelib lib2to3 site-packages test tests turtledemo
    venv""".split()
)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

_LONGEST_PROMPT = 10_000  # characters; what needs more of its module is no function to complete by itself

# the examples see what they see in their module, but for the function
_TESTS = """import doctest
import importlib

def check(candidate):
    names = dict(vars(importlib.import_module({module!r})))
    names[{name!r}] = candidate
    test = doctest.DocTestParser().get_doctest({examples!r}, names, {name!r}, None, 0)
    report = []
    failed, attempted = doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert attempted and not failed, "".join(report)
"""


def stdlib_problems(texts: Container[str] | None = None) -> list[Problem]:
    """One problem for each function of a module whose docstring has examples.

    A prompt is what the function needs of its module (imports, constants, other functions and classes, as far as it
    names them), then its head and its docstring. Not all can be solved: some examples depend on the time, the network
    or on objects that cannot pass between two processes. Scoring keeps those whose own body passes, and an empty one
    does not.

    Args:
        texts: sources of modules to take problems from; all where None.

    Returns:
        Problems in the order of paths and lines.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = (path for path in sorted(root.rglob("*.py")) if not _SKIPPED & set(path.relative_to(root).parts))
    problems: list[Problem] = []
    for path in paths:
        try:
            source = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few declare another encoding
            continue
        if ">>>" in source and (texts is None or source in texts):
            module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            problems += _problems_of(source, module)
    return problems


def _problems_of(source: str, module: str) -> Iterator[Problem]:
    lines = source.splitlines(keepends=True)
    tree = ast.parse(source)
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef) or not _has_examples(node):
            continue
        docstring, begin = node.body[0], node.body[1]
        assert docstring.end_lineno is not None
        if begin.lineno == docstring.end_lineno:
            continue  # both on one line
        context = "".join(_needed(lines, tree, node))
        function = _lines_of(lines, node)
        body_lines = (node.end_lineno or begin.lineno) - docstring.end_lineno
        head = "".join(function.splitlines(keepends=True)[:-body_lines])
        examples = ast.get_docstring(node, clean=True) or ""
        prompt = f"{context}\n\n{head}" if context else head
        if len(prompt) > _LONGEST_PROMPT:
            continue
        yield Problem(
            task_id=f"{module}.{node.name}",
            prompt=prompt,
            entry_point=node.name,
            test=_TESTS.format(module=module, name=node.name, examples=examples),
            canonical_solution=function[len(head) :],
            own_body_decides=True,
        )


def _has_examples(node: ast.FunctionDef) -> bool:
    docstring = ast.get_docstring(node)
    if docstring is None or len(node.body) < 2:
        return False
    try:
        return bool(doctest.DocTestParser().get_examples(docstring))
    except ValueError:  # the examples are badly written
        return False


def _lines_of(lines: list[str], node: ast.stmt) -> str:
    """The source of a statement, whole lines, its decorators included."""
    decorators = node.decorator_list if isinstance(node, _DEFINITIONS) else []
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    text = "".join(lines[first - 1 : node.end_lineno])
    return text if text.endswith("\n") else text + "\n"


def _needed(lines: list[str], tree: ast.Module, function: ast.FunctionDef) -> list[str]:
    """The module's statements that give the names which a function uses, and those which these use, in order."""
    others = (part for part in tree.body if part is not function and not isinstance(part, ast.Delete))
    sources = {statement: _lines_of(lines, statement) for statement in others}
    givers: dict[str, list[ast.stmt]] = {}
    for statement, source in sources.items():
        for name in _given(source):
            givers.setdefault(name, []).append(statement)
    needed: set[ast.stmt] = set()
    waiting = set(_used(_lines_of(lines, function)))
    while waiting:
        for statement in givers.pop(waiting.pop(), []):
            needed.add(statement)
            waiting |= _used(sources[statement])
    return [source for statement, source in sources.items() if statement in needed]


@cache
def _given(source: str) -> frozenset[str]:
    """Names that a statement defines in its module."""
    symbols = symtable(source, "<statement>", "exec").get_symbols()
    return frozenset(symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported())


@cache
def _used(source: str) -> frozenset[str]:
    """Names that a statement, or a function or class within it, takes from its module."""
    names: set[str] = set()
    tables = [symtable(source, "<statement>", "exec")]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        module = table.get_type() == "module"
        names |= {s.get_name() for s in table.get_symbols() if s.is_referenced() and (module or s.is_global())}
    return frozenset(names)
