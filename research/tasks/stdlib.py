"""Questions whose answers Python's own sources have: what a function is for, and what its signature says.

Sources are parsed, never imported: some modules do things when they are.
"""

from __future__ import annotations

import ast
import hashlib
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from research.tasks.records import Example

_MOST_LINES, _MOST_CHARACTERS = 60, 2000  # of a function: longer ones say little about more
_FEWEST_WORDS = 3  # of a docstring's first line
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Function:
    """A function or method of a source.

    Attributes:
        node: as parsed.
        source: without its docstring, and without what all its lines are indented by.
        summary: first line of its docstring; empty where it has none.
        is_method: whether it stands in a class.
    """

    node: FunctionNode
    source: str
    summary: str
    is_method: bool


def docstring_examples(sources: Iterable[str]) -> list[Example]:
    """Summarization: a function without its docstring -> the docstring's first line."""
    found: dict[str, Function] = {}
    for function in _functions(sources):
        if len(function.summary.split()) >= _FEWEST_WORDS:
            found.setdefault(function.source, function)
    return [Example(_id(f), {"document": source}, (f.summary,)) for source, f in found.items()]


def signature_examples(sources: Iterable[str]) -> list[Example]:
    """Question answering: one question about the signature of each function that has at least two parameters.

    It asks for the number of parameters, the first or the last one, the default of one, or the one with some default;
    where the one that is asked for has no default, the right answer is that there is none.
    """
    found: dict[str, Example] = {}
    for function in _functions(sources):
        questions = [] if function.is_method else list(_questions(function.node))
        if questions and function.source not in found:
            # the same question of a function whatever else there is
            question, golds = questions[int(_id(function), 16) % len(questions)]
            fields = {"context": function.source, "question": question}
            found[function.source] = Example(_id(function), fields, golds)
    return list(found.values())


def _questions(node: FunctionNode) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Questions about a signature, with their right answers; the plain kinds of parameters only."""
    arguments = node.args
    if arguments.vararg or arguments.kwarg:
        return  # whether these count is a matter of taste
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: dict[str, ast.expr | None] = dict.fromkeys((a.arg for a in positional), None)
    defaults |= {a.arg: value for a, value in zip(reversed(positional), reversed(arguments.defaults), strict=False)}
    defaults |= {a.arg: value for a, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)}
    names = list(defaults)
    if len(names) < 2:
        return
    count = len(names)
    numbers = (str(count), _NUMBERS[count]) if count < len(_NUMBERS) else (str(count),)
    yield f"How many parameters does {node.name} have?", numbers
    yield f"Which parameter of {node.name} comes first?", (names[0],)
    yield f"Which parameter of {node.name} comes last?", (names[-1],)
    texts = {name: ast.unparse(value) for name, value in defaults.items() if value is not None}
    for name, text in texts.items():
        yield f"What is the default of the parameter {name} of {node.name}?", (text,)
        if list(texts.values()).count(text) == 1:
            yield f"Which parameter of {node.name} has the default {text}?", (name,)
    bare = next((name for name in names if name not in texts), None)
    if texts and bare is not None:
        yield f"What is the default of the parameter {bare} of {node.name}?", ()


def _functions(sources: Iterable[str]) -> Iterator[Function]:
    """Functions of sources, in their order; text that is no Python has none."""
    for text in sources:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about literals that a later Python will refuse
            try:
                tree = ast.parse(text)
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                continue
        lines = text.split("\n")
        methods = {id(child) for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for child in node.body}
        for node in ast.walk(tree):
            if isinstance(node, FunctionNode) and (source := _source(node, lines)) is not None:
                docstring = (ast.get_docstring(node) or "").strip()
                yield Function(node, source, docstring.partition("\n")[0].strip(), id(node) in methods)


def _source(node: FunctionNode, lines: list[str]) -> str | None:
    """The function without its docstring; None where nothing is left of it, or it is too long."""
    begin = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    end = node.end_lineno or node.lineno
    kept = lines[begin:end]
    if ast.get_docstring(node) is not None:
        docstring = node.body[0]
        after = docstring.end_lineno or docstring.lineno
        if len(node.body) == 1 or docstring.lineno == node.lineno or node.body[1].lineno == after:
            return None
        kept = lines[begin : docstring.lineno - 1] + lines[after:end]
    source = textwrap.dedent("\n".join(kept)).strip()
    return source if len(kept) <= _MOST_LINES and len(source) <= _MOST_CHARACTERS else None


def _id(function: Function) -> str:
    """The same in any set of sources."""
    return hashlib.sha256(function.source.encode()).hexdigest()[:16]
