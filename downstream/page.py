"""The page of a report: one HTML file without scripts, fonts or files from elsewhere.

Owns: the style (phone, desktop, print), escaping, tables and embedded pictures.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

STYLE = """
:root { --ink: #1c2024; --soft: #667079; --line: #dfe3e6; --paper: #ffffff; --tint: #f5f7f8; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1.2rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; margin: 0.2rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 0.6rem;
  border-bottom: 1px solid var(--line); padding-bottom: 0.25rem; } h3 { font-size: 1rem; margin: 1.2rem 0 0.4rem; }
p, figcaption { color: var(--soft); margin: 0.35rem 0; } code { font-size: 0.9em; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: 0.6rem; margin: 1rem 0; }
.tile { background: var(--tint); border-radius: 8px; padding: 0.6rem 0.8rem; }
.tile b { display: block; font-size: 1.35rem; } .tile span { color: var(--soft); font-size: 0.85rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 0.8rem; }
.charts svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; min-width: 60%; }
th, td { padding: 0.3rem 0.7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; } tr.first td { font-weight: 600; }
figure { margin: 0.8rem 0; } figure img { max-width: 100%; height: auto; }
pre { background: var(--tint); padding: 0.8rem; border-radius: 8px; overflow-x: auto; font-size: 12.5px; }
details { margin: 0.6rem 0; } summary { cursor: pointer; color: var(--soft); }
@media (max-width: 34rem) { body { padding: 0.8rem; } th, td { padding: 0.25rem 0.35rem; font-size: 0.85rem; }
  th:first-child, td:first-child { white-space: normal; } }
@media print { body { max-width: none; padding: 0; font-size: 11px; } h2 { break-after: avoid; }
  figure, .tile, tr, .charts > div { break-inside: avoid; } details > *:not(summary) { display: block; } }
"""


def document(title: str, body: Iterable[str]) -> str:
    """A whole page."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def text(content: object) -> str:
    """Escaped text."""
    return html.escape(str(content))


def paragraph(content: object) -> str:
    return f"<p>{text(content)}</p>"


def section(title: str, *content: str) -> str:
    """A section; empty without content."""
    inner = "\n".join(part for part in content if part)
    return f"<section><h2>{text(title)}</h2>\n{inner}</section>" if inner else ""


def tiles(values: Sequence[tuple[str, str]]) -> str:
    """Key figures: (name, value)."""
    cells = "".join(f'<div class="tile"><b>{text(value)}</b><span>{text(name)}</span></div>' for name, value in values)
    return f'<div class="tiles">{cells}</div>' if values else ""


def charts(drawn: Sequence[str]) -> str:
    """SVG charts in a grid."""
    return '<div class="charts">' + "".join(f"<div>{chart}</div>" for chart in drawn) + "</div>" if drawn else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, first: int = 0) -> str:
    """A table that scrolls on narrow screens; the first `first` rows are set off."""
    head = "".join(f"<th>{text(name)}</th>" for name in header)
    lines = [
        f"<tr{' class=first' if number < first else ''}>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>"
        for number, row in enumerate(rows)
    ]
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def picture(content: bytes, caption: str, *, kind: str = "png") -> str:
    """An embedded picture with its caption."""
    data = base64.b64encode(content).decode()
    return (
        f'<figure><img src="data:image/{kind};base64,{data}" alt="{text(caption)}">'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )


def folded(summary: str, content: str) -> str:
    """Preformatted text behind a line that opens it."""
    return f"<details><summary>{text(summary)}</summary><pre>{text(content)}</pre></details>"
