"""The watchdog: patient with slow runs, deadly to hung ones, and it says where."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pretrain.watchdog import EXIT_HUNG, Watchdog

ROOT = Path(__file__).resolve().parents[1]


def test_limit_is_the_longer_of_the_two(tmp_path: Path, monkeypatch: object) -> None:
    dog = Watchdog(tmp_path / "hang.txt", rank=0, least_s=10, factor=20)
    assert dog.limit_s() == 10
    dog._durations.extend([0.1, 0.1, 30.0])
    assert dog.limit_s() == 10
    dog._durations.extend([2.0, 2.0, 2.0])
    assert dog.limit_s() == 40


def test_hung_process_ends_and_names_rank_step_and_place(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from pretrain.watchdog import Watchdog\n"
        "def hanging_here(): time.sleep(60)\n"
        "dog = Watchdog(Path(sys.argv[1]), rank=3, least_s=0.2, factor=1); dog.start(); dog.beat(17); hanging_here()"
    )
    report = tmp_path / "logs" / "hang_rank3.txt"
    ended = subprocess.run(
        [sys.executable, "-c", code, str(report)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == EXIT_HUNG
    for text in (ended.stderr, report.read_text()):
        assert "rank 3 hangs" in text
        assert "after step 17" in text
        assert "hanging_here" in text
