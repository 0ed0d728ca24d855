"""Questions with known answers, from files, from datasets of the Hub, or made of Python sources."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yunmin.corpus import STDLIB_SOURCES, load_hub_dataset, read_documents, split_documents
from yunmin.errors import DataError, RequestError

_SPLITS = ("test", "validation")  # of a dataset of the Hub, where none is named


@dataclass(frozen=True)
class Example:
    """One thing to ask.

    Attributes:
        id: of the record.
        fields: that a prompt is made of, by name.
        golds: right answers; none where the right answer is that there is none.
    """

    id: str
    fields: Mapping[str, str]
    golds: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """What the records of a task look like.

    Attributes:
        inputs: fields that a prompt is made of.
        gold: field with the right answers.
        may_lack_answers: whether an empty list of them is an answer, too.
        from_sources: makes examples of Python sources.
    """

    inputs: tuple[str, ...]
    gold: str
    may_lack_answers: bool
    from_sources: Callable[[Iterable[str]], list[Example]]


def read_examples(kind: Kind, source: str, *, held_out: float | None, columns: Mapping[str, str]) -> list[Example]:
    """Reads or makes the examples of a task.

    Args:
        kind: of the records.
        source: a `.jsonl` file of records, a `.json` file as SQuAD has it, `stdlib` (or a part of it) or a folder of
            Python sources, or a dataset of the Hub as `name[:config[:split]]`.
        held_out: of Python sources use only what `yunmin train` holds out when its `validation_share` is this.
        columns: names that records have for the task's fields, where they are others.

    Returns:
        Examples in a fixed order.

    Raises:
        DataError: the source is unknown, empty or malformed; names the file and line.
        RequestError: names of columns for what has none.
    """
    path = Path(source)
    is_python = source in STDLIB_SOURCES or path.is_dir()
    if held_out is not None and not is_python:
        raise DataError(f"--held-out: divides Python sources only (stdlib, or a folder), got {source}")
    if columns and (is_python or path.suffix == ".json"):
        raise RequestError("--fields", f"names columns of records, which {source} has not")
    if is_python:
        documents = read_documents(source)
        if held_out is not None:
            _, documents = split_documents(documents, held_out)
        found = kind.from_sources(document.text for document in documents)
    elif path.suffix == ".json" and path.is_file():
        if kind.gold != "answers":
            raise DataError(f"{source}: a .json file is read as SQuAD, which has questions; expected .jsonl here")
        found = list(_read_squad(path))
    elif path.is_file():
        records = read_lines(path)
        found = [_example(kind, record, columns, where, str(n)) for n, (where, record) in enumerate(records, 1)]
    elif path.suffix in (".json", ".jsonl") or source.startswith((".", "/")):
        raise DataError(f"{source}: expected a .jsonl file, SQuAD's .json or a folder, found no such path")
    else:
        rows = _hub_rows(source)
        found = [_example(kind, row, columns, f"{source} row {n}", str(n)) for n, row in enumerate(rows)]
    if not found:
        raise DataError(f"{source}: nothing found to ask")
    return found


def read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Records of a JSONL file, `.gz` or not, and where each stands.

    Raises:
        DataError: it cannot be read, or a line is no JSON; names file and line.
    """
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: expected a JSON object, {error}") from None


def _example(kind: Kind, record: Any, columns: Mapping[str, str], where: str, number: str) -> Example:
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(record).__name__}")
    fields = {}
    for name in kind.inputs:
        value = record.get(column := columns.get(name, name))
        if not isinstance(value, str):
            raise DataError(f"{where}: expected {column!r} to be a text, found {_shown(record, column)}")
        fields[name] = value
    column = columns.get(kind.gold, kind.gold)
    golds = _golds(record.get(column))
    if golds is None or not (golds or kind.may_lack_answers):
        raise DataError(f"{where}: expected {column!r} to be a text or a list of texts, found {_shown(record, column)}")
    require_unicode(where, (*fields.values(), *golds))
    return Example(str(record.get("id", number)), fields, golds)


def _golds(value: Any) -> tuple[str, ...] | None:
    """One text, several, or `{"text": [...]}` as SQuAD has it on the Hub; a blank one is no answer."""
    if isinstance(value, dict):
        value = value.get("text")
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(dict.fromkeys(text for text in value if text.strip()))
    return None


def _read_squad(path: Path) -> Iterator[Example]:
    """Version 1.1 or 2.0."""
    try:
        data = json.loads(_text(path))
        paragraphs = [paragraph for article in data["data"] for paragraph in article["paragraphs"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: expected SQuAD's JSON (data, paragraphs, qas): {error!r}") from None
    for number, paragraph in enumerate(paragraphs, 1):
        where = f"{path}: paragraph {number}"
        try:
            for question in paragraph["qas"]:
                golds = () if question.get("is_impossible") else tuple(a["text"] for a in question["answers"])
                fields = {"context": paragraph["context"], "question": question["question"]}
                if not all(isinstance(text, str) for text in (*fields.values(), *golds)):
                    raise TypeError("a text")  # noqa: TRY301 (told as the others are)
                require_unicode(where, (*fields.values(), *golds))
                yield Example(str(question["id"]), fields, tuple(dict.fromkeys(filter(str.strip, golds))))
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{where}: expected context and qas of id, question, answers: {error!r}") from None


def _hub_rows(source: str) -> Any:
    name, config, split = [*source.split(":"), "", ""][:3]
    if split:
        return load_hub_dataset(name, config or None, split)
    splits = load_hub_dataset(name, config or None)
    for split in _SPLITS:
        if split in splits:
            return splits[split]
    raise DataError(
        f"{source}: expected a split test or validation, found {', '.join(splits)}; name one: name:config:split"
    )


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text, found byte {error.object[error.start]:#04x}") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"{path}: {reason}") from None


def require_unicode(where: str, texts: Iterable[str]) -> None:
    """Refuses texts with surrogates, which no tokenizer encodes and no file holds.

    Raises:
        DataError: one of them has some.
    """
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: expected Unicode text, {error.reason}") from None


def _shown(record: Mapping[str, Any], column: str) -> str:
    return f"{record[column]!r:.60}" if column in record else f"the fields {', '.join(map(str, record)) or 'none'}"
