"""A report as data: blocks that are written as Markdown here, and as HTML next door."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Heading:
    """A heading; 1 is the title."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of plain texts."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table of plain texts; all columns but the first `labels` hold numbers.

    Attributes:
        header: names of the columns.
        rows: as long as the header.
        labels: how many columns, from the left, are text.
        note: how to read it.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    labels: int = 1
    note: str = ""


@dataclass(frozen=True)
class Image:
    """A PNG beside the report.

    Attributes:
        path: relative to the report's folder.
        title: what it shows.
        caption: how to read it.
    """

    path: str
    title: str
    caption: str


@dataclass(frozen=True)
class Code:
    """Lines to be taken as they are."""

    text: str


Block = Heading | Paragraph | Bullets | Table | Image | Code


def to_markdown(blocks: Sequence[Block]) -> str:
    """The document in GitHub's Markdown; no text can be taken for markup."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {_CLOSING.sub(_BACKSLASH, _escaped(text))}"
        case Paragraph(text):
            return _escaped(text)
        case Bullets(items):
            return "\n".join(f"- {_escaped(item)}" for item in items)
        case Table(header, rows, labels, note):
            rule = [":--" if column < labels else "--:" for column in range(len(header))]
            lines = [_row([_escaped(cell, is_cell=True) for cell in cells]) for cells in (header, *rows)]
            table = "\n".join([lines[0], _row(rule), *lines[1:]])
            return f"{table}\n\n{_escaped(note)}" if note else table
        case Image(path, title, caption):
            return f"![{_escaped(title)}]({path})\n\n{_escaped(caption)}"
        case Code(text):
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
            return f"{fence}\n{text}\n{fence}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


# what Markdown takes for markup wherever it stands, and what only in some places
_MARKUP = re.compile(
    r"[\\`*|$]"
    r"|_(?!\w)|(?<!\w)_"
    r"|\](?=[(\[:])"
    r"|<(?=[A-Za-z/!?])"
    r"|&(?=#?\w+;)"
    r"|~(?=~)"
)
_CLOSING = re.compile(r"(?<=\s)(?=#+$)")  # of a heading
_BACKSLASH = r"\\"
_AT_START = re.compile(r"^(?:[>#+=\[-]|\d+(?=[.)](?:\s|$)))")


def _escaped(text: str, *, is_cell: bool = False) -> str:
    """Text on one line, with a backslash before all that Markdown would take for markup; cells begin no block."""
    line = _MARKUP.sub(r"\\\g<0>", " ".join(text.split()))
    start = _AT_START.match(line)
    if is_cell or start is None:
        return line
    return f"{start[0]}\\{line[start.end() :]}" if start[0].isdigit() else f"\\{line}"
