"""The short form of the chaos run (tests/chaos.py), and the long one."""

from __future__ import annotations

import pytest

from tests import chaos


def test_one_of_each_kind_that_no_other_test_has(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ["kill one", "two lives", "damage"]
    assert chaos.main(["--seed", "3", "--faults", "3", "--kinds", *kinds]) == 0
    assert "weights bitwise equal" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_many_disasters(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert chaos.main(["--seed", str(seed), "--faults", "25"]) == 0
