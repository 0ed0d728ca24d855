"""Three texts that share nothing: to train on, to tune by, to report on."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from yunmin.corpus import Document, read_documents, split_documents
from yunmin.errors import DataError
from yunmin.files import atomic_file

_SEED = 0


@dataclass(frozen=True)
class Split:
    """Files of JSON lines, as `yunmin.corpus.read_documents` reads them.

    Attributes:
        train: learned from.
        tune: validated on while training, calibrated on; choices are made by it.
        test: reported on, and used for nothing else.
        source: what they were made of.
    """

    train: Path
    tune: Path
    test: Path
    source: str


def split_text(
    sources: Sequence[str], folder: Path, *, tune_share: float = 0.05, test_share: float = 0.05, most: int | None = None
) -> Split:
    """Divides documents among three files in a folder, the same ones whenever it is called.

    Args:
        sources: as `read_documents` has them.
        folder: gets `train.jsonl`, `tune.jsonl` and `test.jsonl`.
        tune_share, test_share: of the documents (of the end of each, where there are few).
        most: documents to take of each source, at equal distances; None for all.

    Raises:
        DataError: a source is unknown or empty, or leaves one of the three without text.
    """
    documents: list[Document] = []
    for source in sources:
        found = read_documents(source)
        documents += found if most is None or len(found) <= most else found[:: -(-len(found) // most)]
    documents = list(dict.fromkeys(documents))
    rest, test = split_documents(documents, test_share)
    train, tune = split_documents(rest, tune_share / (1 - test_share)) if rest else ([], [])
    split = Split(folder / "train.jsonl", folder / "tune.jsonl", folder / "test.jsonl", ", ".join(sources))
    for path, part in ((split.train, train), (split.tune, tune), (split.test, test)):
        # few tokens of any part see all kinds of documents
        random.Random(_SEED).shuffle(part)  # noqa: S311 (no secret)
        if not part:
            raise DataError(f"{split.source}: {len(documents)} documents leave none for {path.stem}")
        write_documents(path, part)
    return split


def write_documents(path: Path, documents: Sequence[Document]) -> None:
    """Writes documents as JSON lines that `read_documents` reads back, the file whole or not at all."""
    with atomic_file(path) as aside, aside.open("w", encoding="utf-8") as file:
        for document in documents:
            record = {"prompt": document.prompt, "completion": document.text} if document.prompt else None
            file.write(json.dumps(record or {"text": document.text}) + "\n")
