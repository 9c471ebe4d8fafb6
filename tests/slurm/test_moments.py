"""Faults at every moment of a life, and one after another.

Each case is a list of (life, moment, strike). After all of them the run is what an undisturbed one is, bit for bit.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.conftest import Desk, check
from tests.slurm.moments import strike

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("healed")]

CASES = {
    "startup": [
        (0, "ranks start", "kill first"),
        (1, "importing", "signal"),
        (2, "ranks start", "signal to all"),
        (3, "importing", "crash second"),
    ],
    "saving": [(0, "saving", "kill first"), (1, "saving", "crash first")],
    "exporting": [
        (0, "exporting", "kill first"),
        (1, "exporting", "signal"),
    ],
    "requeued": [(0, "training", "requeue"), (1, "importing", "requeue"), (2, "exporting", "requeue")],
    "killed": [(0, "training", "kill last"), (1, "training", "kill first"), (2, "training", "signal to all")],
    "scripts": [(0, "importing", "kill script"), (1, "training", "kill script")],
    "crashed": [(0, "training", "crash first"), (1, "training", "heal"), (1, "training", "crash second")],
}


@pytest.mark.parametrize("name", CASES)
def test_run_that_was_struck(desk: Desk, undisturbed: Path, name: str) -> None:
    desk.launch("tiny.yaml", f"name=struck-{name}", "--detach")
    for life, moment, what in CASES[name]:
        strike(desk.training(f"struck-{name}"), life, moment, what)
    check(desk, f"struck-{name}", undisturbed, lives=CASES[name][-1][0] + 1)
