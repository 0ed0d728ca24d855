"""The bar that long work shows on a terminal, and the lines it shows elsewhere."""

from __future__ import annotations

import importlib.util
import io

import pytest

from yunmin.terminal_bar import TerminalBar


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _shown(stream: io.StringIO) -> str:
    with TerminalBar("{task.fields[what]}", "{task.fields[loss]:.2f}", stream=stream, what="[bold]", loss=0.0) as bar:
        bar.update(total=4, completed=1, loss=1.5)
        bar.line("a line [with] brackets")
        bar.restart(total=3, what="[/second]")
        bar.update(completed=2)
    return stream.getvalue()


def test_a_terminal_gets_a_bar_and_texts_as_they_are() -> None:
    shown = _shown(_Terminal())
    assert "a line [with] brackets" in shown
    assert all(part in shown for part in ("2/3", "[/second]", "1.50"))


def test_elsewhere_there_are_lines_alone() -> None:
    assert _shown(io.StringIO()) == "a line [with] brackets\n"


def test_without_rich_a_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert _shown(_Terminal()) == "a line [with] brackets\n"
