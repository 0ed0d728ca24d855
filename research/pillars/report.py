"""A comparison as a page: a question, what was found, a plot, and what it rests on."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from research.reports import words
from research.reports.document import Block, Heading, Image, Paragraph, to_markdown
from yunmin.errors import DataError, MissingExtraError
from yunmin.files import atomic_file

_INCHES, _DPI = (8.0, 4.5), 120


def write_report(module_name: str, found: Mapping[str, Any], folder: Path, stem: str) -> str:
    """Writes `STEM.md` and `STEM.png` into a folder; returns the Markdown.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    module = importlib.import_module(f"research.pillars.{module_name}")
    draw(module_name, found, folder / f"{stem}.png")
    text = to_markdown([Heading(1, module.TITLE), *page(module_name, found, f"{stem}.png")])
    with atomic_file(folder / f"{stem}.md") as aside:
        aside.write_text(text, encoding="utf-8")
    return text


def page(module_name: str, found: Mapping[str, Any], image: str) -> list[Block]:
    """The page below its title."""
    module = importlib.import_module(f"research.pillars.{module_name}")
    s = found["settings"]
    text = s["base_text"] if s["base_text"] == s["text"] else f"{s['text']} after {s['base_text']}"
    trained = f"{s['base_steps']} steps of {s['base_batch']} sequences"
    if s["adapts"]:
        trained += f", then {s['steps']} steps of {s['batch']}"
    scored = f"{s['test_tokens']:,} test tokens, window and stride {s['window']}"
    rests = (
        f"Models of about {s['parameters']:,} parameters; {text}; {words.count(s['seeds'], 'seed')}; base models of "
        f"{trained}, all of {s['window']} tokens. Texts to train on, to tune by and to report on are different "
        "documents, or different parts where there are few (in brackets, how the SHA-256 of the first begins); "
        f"{scored}. Changes are means over seeds of paired differences of log-perplexity, intervals Student's t, "
        "p-values of paired t-tests with Holm's correction over all tests of a table."
    )
    return [
        Paragraph(module.QUESTION),
        *module.blocks(found),
        Image(image, module.TITLE, f"{module.plot.__doc__.strip().splitlines()[0]}"),
        Paragraph(rests),
    ]


def update_section(file: Path, module_name: str, found: Mapping[str, Any], stem: str) -> None:
    """Renews what stands between `<!-- begin STEM -->` and `<!-- end STEM -->` in a Markdown file, and its plot.

    The plot goes to a folder beside the file, named like it.

    Raises:
        DataError: the file has no such lines.
    """
    head, tail = _around_section(file, stem)
    (file.parent / file.stem).mkdir(exist_ok=True)
    draw(module_name, found, file.parent / file.stem / f"{stem}.png")
    body = to_markdown(page(module_name, found, f"{file.stem}/{stem}.png"))
    with atomic_file(file) as aside:
        aside.write_text(f"{head}\n\n{body}\n{tail}", encoding="utf-8")


def check_section(file: Path, stem: str) -> None:
    """Checks that a Markdown file has a place for a comparison.

    Raises:
        DataError: there is no such file, or no such place in it.
    """
    _around_section(file, stem)


def _around_section(file: Path, stem: str) -> tuple[str, str]:
    begin, end = f"<!-- begin {stem} -->", f"<!-- end {stem} -->"
    try:
        whole = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: expected a Markdown file, {error}") from None
    if whole.count(begin) != 1 or whole.count(end) != 1:
        raise DataError(f"{file}: expected one line {begin} and one line {end}")
    return whole.partition(begin)[0] + begin, end + whole.partition(end)[2]


def draw(module_name: str, found: Mapping[str, Any], path: Path) -> None:
    """Draws a comparison's plot."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ModuleNotFoundError:
        raise MissingExtraError("matplotlib", "research", "plots") from None
    module = importlib.import_module(f"research.pillars.{module_name}")
    figure, axes = pyplot.subplots(figsize=_INCHES, layout="constrained")
    module.plot(found, axes)
    axes.set_title(module.TITLE)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=_DPI)
    pyplot.close(figure)
