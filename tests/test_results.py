"""The figures in docs/results.md and the README are those of docs/results: none is typed by hand and wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from downstream import comparison

DOCS = Path(__file__).resolve().parents[1] / "docs"
TABLE = re.compile(r"<!-- figures: (.+) -->\n\n((?:\|.*\n)+)")
# Results are shares, but for boards solved and accuracy under attack: in percent already (calibration is not).
TO_PERCENT = {"results/sudoku.json": (1,), "results/robustness.json": (1, 100)}
NUMBER = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.])")


def _figures(value: Any) -> Iterator[float]:
    """Size of every number of a results file; signs stand before the figures of intervals."""
    if isinstance(value, dict):
        for item in value.values():
            yield from _figures(item)
    elif isinstance(value, list):
        for item in value:
            yield from _figures(item)
    elif isinstance(value, float):
        yield abs(value)


def _tables() -> list[tuple[str, str]]:
    """Names of the files that a table's figures come from, and the table."""
    pages = (DOCS / "results.md", DOCS.parent / "README.md")
    return [found for page in pages for found in TABLE.findall(page.read_text())]


def test_there_are_tables() -> None:
    assert _tables()


@pytest.mark.parametrize(("sources", "table"), _tables())
def test_every_figure_stands_in_its_results_file(sources: str, table: str) -> None:
    known = {
        f"{factor * number:.1f}"
        for source in sources.split()
        for factor in TO_PERCENT.get(source, (100,))
        for number in _figures(json.loads((DOCS / source).read_text()))
    }
    figures = NUMBER.findall(re.sub(r"(?m)^\|[^|]*", "", table))  # without the names of the rows
    assert figures
    assert set(figures) <= known


@pytest.mark.parametrize(("source", "table"), [found for found in _tables() if " " not in found[0]])
def test_tables_of_several_runs_are_what_the_report_printed(source: str, table: str) -> None:
    content = json.loads((DOCS / source).read_text())
    if "rows" in content:
        assert table == comparison.markdown(content)
