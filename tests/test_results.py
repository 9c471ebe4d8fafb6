"""The figures in docs/results.md are those of the results files beside it: none is typed by hand and wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from downstream import comparison

DOCS = Path(__file__).resolve().parents[1] / "docs"
TABLE = re.compile(r"<!-- figures: (\S+) -->\n\n((?:\|.*\n)+)")
NUMBER = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.])")


def _shares(value: Any) -> Iterator[float]:
    """Every number of a results file in percent, as the file has it (Sudoku, robustness) or a hundred times a share."""
    if isinstance(value, dict):
        for item in value.values():
            yield from _shares(item)
    elif isinstance(value, list):
        for item in value:
            yield from _shares(item)
    elif isinstance(value, float):
        yield from (abs(value), 100 * abs(value))  # signs stand before the figures of intervals


def _tables() -> list[tuple[str, str]]:
    return TABLE.findall((DOCS / "results.md").read_text())


def test_there_are_tables() -> None:
    assert _tables()


@pytest.mark.parametrize(("source", "table"), _tables())
def test_every_figure_stands_in_its_results_file(source: str, table: str) -> None:
    known = {f"{share:.1f}" for share in _shares(json.loads((DOCS / source).read_text()))}
    figures = NUMBER.findall(table)
    assert figures
    assert set(figures) <= known


@pytest.mark.parametrize(("source", "table"), _tables())
def test_tables_of_several_runs_are_what_the_report_printed(source: str, table: str) -> None:
    content = json.loads((DOCS / source).read_text())
    if "rows" in content:
        assert table == comparison.markdown(content)
