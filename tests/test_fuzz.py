"""The short form of the fuzzing of tests/fuzz.py."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import fuzz
import pytest


def test_three_hundred_hostile_inputs_do_no_harm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    ended = fuzz.fuzz(300, seed=1)
    assert sum(ended.values()) == 300
    kinds = {line.split(":")[0] for line in ended}
    assert kinds == set(fuzz.CASES)
    assert any(line.endswith("read") for line in ended)
    assert any(line.endswith("refused") for line in ended)


def test_a_failure_is_told_with_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(draw: random.Random, place: Path) -> None:
        raise KeyError("unexpected")

    def escape(draw: random.Random, place: Path) -> None:
        (place.parent / "out").write_text("x")

    for case, message in ((crash, r"case 5 \(scan\): KeyError"), (escape, r"case 5 \(scan\) wrote out outside")):
        monkeypatch.setattr(fuzz, "CASES", {"scan": (case, 1)})
        with pytest.raises(AssertionError, match=message):
            fuzz.fuzz(1, seed=0, first=5)
    assert fuzz.__name__ in sys.modules
    assert os.getcwd()
