"""A report as one HTML file that needs nothing else: plots are inside, nothing is fetched."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from pathlib import Path

from research.reports.document import Block, Bullets, Code, Heading, Image, Paragraph, Table

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --link: #0072B2; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 78rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.3rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.1rem; margin-top: 1.8rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
td:not(.label) { white-space: nowrap; }
th { background: var(--soft); cursor: pointer; } th.label, td.label { text-align: left; }
.note, figcaption { font-size: .88rem; opacity: .8; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; background: white; border-radius: 6px; }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; border-radius: 6px; }
"""
# a click on a column's head sorts by it, as numbers where they are numbers, and the other way round at the next click
_SCRIPT = """
const number = cell => parseFloat(cell.replace(/[\\u2212]/g, '-').replace(/^[<[]/, '').replace(/,/g, ''));
document.querySelectorAll('th').forEach(head => head.addEventListener('click', () => {
  const body = head.closest('table').tBodies[0], column = head.cellIndex, sign = head.dataset.sign === '1' ? -1 : 1;
  head.dataset.sign = sign;
  const order = (a, b) => {
    const [x, y] = [a, b].map(row => row.cells[column].textContent), [m, n] = [number(x), number(y)];
    return sign * (isNaN(m) || isNaN(n) ? isNaN(m) - isNaN(n) || x.localeCompare(y) : m - n);
  };
  body.append(...[...body.rows].sort(order));
}));
"""


def to_html(blocks: Sequence[Block], folder: Path) -> str:
    """The document as one HTML page, light or dark as the reader's system is.

    Args:
        blocks: the first heading is the page's title.
        folder: where the paths of images begin.
    """
    title = next((block.text for block in blocks if isinstance(block, Heading)), "Report")
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
{"".join(f"{_html(block, folder)}{chr(10)}" for block in blocks)}<script>{_SCRIPT}</script>
</body>
</html>
"""


def _html(block: Block, folder: Path) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{escape(text)}</p>"
        case Bullets(items):
            return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"
        case Table():
            return _table(block)
        case Image(path, title, caption):
            data = base64.b64encode((folder / path).read_bytes()).decode()
            source = f"data:image/png;base64,{data}"
            return (
                f'<figure><img src="{source}" alt="{escape(title)}"><figcaption>{escape(caption)}</figcaption></figure>'
            )
        case Code(text):
            return f"<pre>{escape(text)}</pre>"


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        marks = [' class="label"' if column < table.labels else "" for column in range(len(cells))]
        inner = "".join(f"<{tag}{mark}>{escape(cell)}</{tag}>" for cell, mark in zip(cells, marks, strict=True))
        return f"<tr>{inner}</tr>"

    body = "\n".join(row(cells, "td") for cells in table.rows)
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    head = row(table.header, "th")
    return f'<div class="wide"><table><thead>{head}</thead><tbody>\n{body}</tbody></table></div>{note}'
