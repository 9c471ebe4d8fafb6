"""What is read from a run's growing files, and how it is said."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from cluster.progress import Progress, RunReader, duration, event_text
from cluster.status import progress_of, stream
from cluster.tail import JsonTail, last_lines, last_rows


def write(path: Path, *rows: dict[str, Any], end: str = "") -> None:
    with path.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows) + end)


def test_half_a_line_is_read_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    tail = JsonTail(path)
    assert tail.read() == []
    write(path, {"step": 1}, end='{"st')
    assert tail.read() == [{"step": 1}]
    write(path, end='ep": 2}\n')
    assert tail.read() == [{"step": 2}]


def test_after_a_rollback_new_rows_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, *({"step": step} for step in range(1, 30)))
    tail = JsonTail(path)
    tail.read()
    path.unlink()
    write(path, *({"step": step} for step in range(1, 11)))
    tail.read()
    write(path, {"step": 11})
    assert tail.read() == [{"step": 11}]


def test_the_last_lines_of_a_long_file(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, *({"step": step, "text": "x" * 100} for step in range(5000)))
    assert [row["step"] for row in last_rows(path, 3)] == [4997, 4998, 4999]
    assert len(last_lines(path, 7)) == 7
    assert last_lines(path, 0) == []
    assert last_lines(tmp_path / "none", 3) == []


def test_the_line_of_a_training() -> None:
    progress = Progress(steps=100)
    assert progress.text() == "step 0/100"
    progress.add(
        {"step": 40, "loss": 3.25, "views_per_s": 1234.5, "step_s": 2.0, "data_wait_s": 0.5, "grad_norm": None}
    )
    assert progress.text() == "step 40/100  loss 3.2500  1,234 views/s  data wait 0.50 s  2 min 0 s left"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (61, "1 min 1 s"), (3700, "1 h 1 min"), (90000, "1 d 1 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_events_are_told_once_and_give_the_length(tmp_path: Path) -> None:
    write(tmp_path / "events.jsonl", {"event": "old", "time": 0})
    reader = RunReader(tmp_path, None)
    write(tmp_path / "events.jsonl", {"event": "started", "step": 0, "steps": 50, "world_size": 2})
    write(tmp_path / "events.jsonl", {"event": "saved", "step": 10})
    write(tmp_path / "events.jsonl", {"event": "damaged", "path": "step_00000010", "reason": "checksum"})
    assert reader.read() == ["started at step 0: world_size 2", "damaged: path step_00000010, reason checksum"]
    assert reader.progress.steps == 50
    assert reader.read() == []


def test_a_long_run_is_read_from_its_end(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", *({"step": step, "step_s": 9.0} for step in range(1, 1000)))
    write(tmp_path / "metrics.jsonl", *({"step": step, "step_s": 2.0} for step in range(1000, 1100)))
    write(tmp_path / "events.jsonl", {"event": "started", "steps": 2000})
    write(tmp_path / "events.jsonl", *({"event": "saved", "step": step} for step in range(1100)))
    reader = RunReader(tmp_path, 2000)
    for progress in (reader.progress, progress_of(tmp_path)):
        assert (progress.step, progress.steps, progress.seconds_left) == (1099, 2000, 2.0 * 901)
    write(tmp_path / "metrics.jsonl", {"step": 1100})
    assert reader.read() == []
    assert reader.progress.step == 1100


def test_lines_of_a_followed_log_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "rank0.log"
    path.write_text("first\n")
    lines = stream(path, lines=5, keep_on=True)
    assert next(lines) == "first"
    threading.Timer(0.1, write, [path], {"end": "half of "}).start()
    threading.Timer(0.5, write, [path], {"end": "a line\n"}).start()
    assert next(lines) == "half of a line"


def test_long_values_are_cut() -> None:
    assert len(event_text({"event": "x", "keys": "y" * 1000})) < 300
