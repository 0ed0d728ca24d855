"""The texts of a study: one that base models learn from, and three of the task that share nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from research.ablation.settings import Settings
from research.studies.texts import Split, split_text, write_documents
from yunmin.corpus import read_documents
from yunmin.files import atomic_file, write_json

_SHARE = 0.1  # of the task's documents to tune by, and as much to report on
_PARTS = ("train", "tune", "test")  # as `split_text` names its files
_TASK = "stdlib:reference"  # the documentation in the running Python's library
_RECORD = "sources.json"


@dataclass(frozen=True)
class Texts:
    """Files of JSON lines.

    Attributes:
        base: what base models are trained on, where there are any; none of it belongs to the task.
        task: the task's text, divided.
    """

    base: Path
    task: Split


def prepare_texts(settings: Settings, folder: Path) -> Texts:
    """Writes the study's texts, unless the folder has them: sources may change while a study goes on, its texts do not.

    Without sources the task is the documentation in the running Python's library, and base models learn from the
    library's code: a model of one kind of text is adapted to another, as users do. With sources of one's own, base
    models learn from the code as well, without what the task has (if nothing is left, from the task's training text).

    Raises:
        DataError: a source is unknown or empty, or too short to divide.
    """
    base_documents = 0 if settings.checkpoint is not None else settings.base_documents
    record = {"data": list(settings.data), "base_documents": base_documents}
    train, tune, test = (folder / f"{part}.jsonl" for part in _PARTS)
    texts = Texts(folder / "base.jsonl", Split(train, tune, test, _name(settings)))
    if (folder / _RECORD).is_file() and json.loads((folder / _RECORD).read_text(encoding="utf-8")) == record:
        return texts
    sources = list(settings.data) or [_TASK]
    split_text(sources, folder, tune_share=_SHARE, test_share=_SHARE)
    if base_documents:
        others = {document for source in sources for document in read_documents(source)}
        code = [d for d in read_documents("stdlib:code") if d not in others] or read_documents(str(train))
        write_documents(texts.base, code[:: -(-len(code) // base_documents)])
    with atomic_file(folder / _RECORD) as aside:
        write_json(aside, record)
    return texts


def _name(settings: Settings) -> str:
    return ", ".join(settings.data) or "documentation of the running Python"
