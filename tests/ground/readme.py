"""Reads the README's code blocks, as `test_readme` runs them."""

from __future__ import annotations

import re
from dataclasses import dataclass

_FENCE = re.compile(r"^( *)```([a-z]*) *\n(.*?)^\1``` *$", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\s*\Z")
RUNNABLE = ("bash", "python")


@dataclass(frozen=True)
class Block:
    """A fenced code block.

    Attributes:
        language: "bash" or "python".
        code: its lines, without the fence's indentation.
        line: number of its first line in the README.
        not_run: the reason given in a `<!-- not run: REASON -->` right before the block, or None.
    """

    language: str
    code: str
    line: int
    not_run: str | None


def code_blocks(markdown: str) -> list[Block]:
    """All blocks of runnable languages, in order."""
    blocks = []
    for match in _FENCE.finditer(markdown):
        if match[2] in RUNNABLE:
            reason = _NOT_RUN.search(markdown[: match.start()])
            code = re.sub(rf"^{match[1]}", "", match[3], flags=re.MULTILINE)
            line = markdown.count("\n", 0, match.start(3)) + 1
            blocks.append(Block(match[2], code, line, reason[1] if reason else None))
    return blocks


def commands(code: str) -> list[str]:
    """The commands of a bash block: lines, joined where one ends in a backslash or inside quotes, without comments."""
    found: list[str] = []
    pending = ""
    for line in code.splitlines():
        pending += line + "\n"
        if line.endswith("\\") or _open_quote(pending):
            continue
        if pending.strip() and not pending.lstrip().startswith("#"):
            found.append(pending.rstrip("\n"))
        pending = ""
    if pending.strip():
        raise ValueError(f"unfinished command: {pending!r}")
    return found


def _open_quote(text: str) -> bool:
    quote = ""
    for character in re.sub(r"\\.", "", text, flags=re.DOTALL):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character == "#":
            return False  # a comment up to the end of the line
    return bool(quote)
