"""The figures of the moved training in docs/results.md are those that its command wrote."""

from __future__ import annotations

import json
from pathlib import Path

from tests.benchmarks.invariance import MARKS, STEPS, compare, markdown

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_curves_in_the_documents_are_those_of_the_results_file() -> None:
    result = json.loads((DOCS / "results" / "invariance.json").read_text())
    assert markdown(result["curve"]) in (DOCS / "results.md").read_text()


def test_where_curves_part() -> None:
    theirs = [2.0] * STEPS
    ours = [2.0] * 600 + [2.0 + 1e-6] * 100 + [2.2] * (STEPS - 700)
    found = compare(ours, theirs)
    assert found["steps_within"] == {"0.0": 600, "1e-05": 700, "0.001": 700}
    assert [found["largest"][str(mark)] > 0 for mark in MARKS] == [mark > 600 for mark in MARKS]
    assert abs(found["end_difference"]["difference"] - 0.2) < 1e-9
