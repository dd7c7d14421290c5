"""A self-contained HTML page: sections, tables and drawings, without scripts and without the network."""

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --text: #24292f; --page: #ffffff; --grid: #d0d7de; --dim: #6e7781; --bad: #cf222e; --good: #1a7f37 }
@media (prefers-color-scheme: dark) {
:root { --text: #e6edf3; --page: #0d1117; --grid: #30363d; --dim: #8b949e; --bad: #f85149; --good: #3fb950 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page) }
body { max-width: 1080px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid var(--grid) }
table { border-collapse: collapse; display: block; overflow-x: auto }
td, th { padding: 3px 12px 3px 0; text-align: left; vertical-align: top }
th { color: var(--dim); font-weight: 600; border-bottom: 1px solid var(--grid) }
td.number { text-align: right; font-variant-numeric: tabular-nums }
pre { white-space: pre-wrap; border-left: 3px solid var(--grid); padding-left: 1em; margin: .3em 0 1em }
.dim { color: var(--dim) } .bad { color: var(--bad) } .good { color: var(--good) } figure { margin: 0; display: inline-block }
"""


def page(title: str, sections: Iterable[tuple[str, str]]) -> str:
    """The whole document; a section is its heading and its HTML, and is left out if that is empty."""
    body = "\n".join(f"<section><h2>{escape(heading)}</h2>\n{html}</section>" for heading, html in sections if html)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells of text; those that begin with a digit or a sign and a digit stand on the right. Empty without rows."""
    made = [f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in rows]
    top = f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>" if any(head) else ""
    return f"<table>{top}{''.join(made)}</table>" if made else ""


def _cell(text: str) -> str:
    number = text.lstrip("+-−").replace(",", "")[:1].isdigit()
    return f"<td{' class=number' if number else ''}>{escape(text)}</td>"


def notes(lines: Iterable[str], kind: str = "") -> str:
    """A list; empty without lines."""
    made = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="{kind}">{made}</ul>' if made else ""


def paragraph(text: str, kind: str = "") -> str:
    """One paragraph of text."""
    return f'<p class="{kind}">{escape(text)}</p>'


def quoted(text: str) -> str:
    """Text whose lines and blanks matter."""
    return f"<pre>{escape(text)}</pre>"
