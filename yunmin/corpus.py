"""Text to train and evaluate on: files, folders, JSONL, the running Python's own library, Hub datasets when online."""

from __future__ import annotations

import contextlib
import json
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yunmin.errors import DataError, MissingExtraError

_TEXT_SUFFIXES = frozenset({".md", ".py", ".rst", ".text", ".txt"})
# tests and tables that no one would want a language model to continue
_STDLIB_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__", "pydoc_data"}
)
_FEW_DOCUMENTS = 20


@dataclass(frozen=True)
class Document:
    """A text to learn; `prompt` stands before it and is read but not learned."""

    text: str
    prompt: str = ""


def read_documents(source: str) -> list[Document]:
    """Reads a data source.

    Args:
        source: `stdlib` (or one of its parts, `stdlib:code` and `stdlib:reference`), a text file, a `.jsonl` file
            (lines with `text`, or `prompt` and `completion`), a folder of text files, or a Hugging Face dataset's name
            (`name` or `name:config`, its `text` column) when online.

    Returns:
        Documents in a fixed order, none empty, none twice.

    Raises:
        DataError: the source is unknown, empty or malformed; names the file and line.
    """
    path = Path(source)
    if source in STDLIB_SOURCES:
        documents = [d for part in STDLIB_SOURCES[source] for d in part()]
    elif path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in {*_TEXT_SUFFIXES, ".jsonl"})
        documents = [d for p in files for d in _read_file(p)]
    elif path.is_file():
        documents = _read_file(path)
    elif path.suffix or source.startswith((".", "/")):
        raise DataError(f"{source}: expected a text file, a .jsonl file or a folder, found no such path")
    else:
        documents = _hub_documents(source)
    distinct = list(dict.fromkeys(d for d in documents if d.text.strip()))
    if not distinct:
        raise DataError(f"{source}: no text found")
    return distinct


def split_documents(documents: Sequence[Document], held_out: float) -> tuple[list[Document], list[Document]]:
    """Splits into training and held-out documents that never overlap.

    Documents are held out at equal distances; where there are few, the end of each, cut at a line.

    Args:
        documents: distinct, in a fixed order.
        held_out: share to hold out, between 0 and 1.

    Returns:
        Training and held-out documents.
    """
    if not 0 < held_out < 1:
        raise DataError(f"the held-out share must lie between 0 and 1, got {held_out}")
    training: list[Document] = []
    validation: list[Document] = []
    if len(documents) >= _FEW_DOCUMENTS and int(len(documents) * held_out) >= 1:
        for i, document in enumerate(documents):
            # whenever the share of the documents so far reaches one more
            is_held_out = int((i + 1) * held_out) > int(i * held_out)
            (validation if is_held_out else training).append(document)
        return training, validation
    for document in documents:
        cut = int(len(document.text) * (1 - held_out))
        cut = document.text.rfind("\n", 0, cut) + 1 or cut
        head, tail = document.text[:cut], document.text[cut:]
        training += [Document(head, document.prompt)] if head.strip() else []
        validation += [Document(tail, document.prompt)] if tail.strip() else []
    return training, validation


def texts_of(documents: Iterable[Document]) -> list[str]:
    """The documents' whole texts, prompts included."""
    return [d.prompt + d.text for d in documents]


def _stdlib_code() -> list[Document]:
    """Sources of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in root.rglob("*.py") if not _STDLIB_SKIPPED & set(p.relative_to(root).parts))
    sources = []
    for path in files:
        with contextlib.suppress(UnicodeDecodeError):  # a few declare another encoding
            sources.append(Document(path.read_text(encoding="utf-8")))
    return sources


def _stdlib_reference() -> list[Document]:
    """The language reference that `help()` shows, in English."""
    from pydoc_data.topics import topics

    return [Document(topics[name]) for name in sorted(topics)]


STDLIB_SOURCES = {
    "stdlib": (_stdlib_code, _stdlib_reference),
    "stdlib:code": (_stdlib_code,),
    "stdlib:reference": (_stdlib_reference,),
}


def _read_file(path: Path) -> list[Document]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text, found byte {error.object[error.start]:#04x}") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    if path.suffix != ".jsonl":
        return [Document(text)]
    return [_read_record(path, n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]


def _read_record(path: Path, number: int, line: str) -> Document:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{number}: expected a JSON object, {error.msg}") from None
    fields = record if isinstance(record, dict) else {}
    match fields:
        case {"text": str(text)}:
            document = Document(text)
        case {"prompt": str(prompt), "completion": str(completion)}:
            document = Document(completion, prompt)
        case _:
            raise DataError(f"{path}:{number}: expected the string 'text', or 'prompt' and 'completion'")
    try:
        (document.prompt + document.text).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{path}:{number}: expected Unicode text, {error.reason}") from None
    return document


def load_hub_dataset(name: str, config: str | None = None, split: str | None = None) -> Any:
    """A dataset of the Hugging Face Hub.

    Args:
        name: of the dataset.
        config: of its variants; None where it has but one.
        split: of it; None gives all of them by name.

    Raises:
        MissingExtraError: datasets is not installed.
        DataError: the Hub cannot be reached, or has no such dataset.
    """
    try:
        import datasets
        from huggingface_hub import HfApi, constants
    except ModuleNotFoundError:
        raise MissingExtraError("datasets", "train", f"the dataset {name!r}") from None
    try:
        if not constants.HF_HUB_OFFLINE:  # one question, since `datasets` asks an unreachable Hub for half a minute
            HfApi().dataset_info(name, timeout=10)
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # noqa: BLE001 (the library raises many unrelated kinds)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{name!r} is no file, folder, 'stdlib' or 'synthetic', and no dataset that the Hub gives: {reason}"
        ) from None


def _hub_documents(name: str) -> list[Document]:
    dataset, _, config = name.partition(":")
    rows = load_hub_dataset(dataset, config or None, "train")
    if "text" not in rows.column_names:
        raise DataError(f"dataset {name!r}: expected a column 'text', found {', '.join(rows.column_names)}")
    return [Document(text) for text in rows["text"]]
