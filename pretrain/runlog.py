"""The text files of a run: metrics.jsonl, one object per complete step, and events.jsonl, what happened.

Owns: that each step stands in metrics.jsonl once. A life begins by writing the file anew, up to the step that it
resumes from, and renaming it into place: what a rollback undoes is cut off, and an older life that still runs appends
to a file that no longer has a name.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

LOUD = {
    "initialised",
    "save_failed",
    "damaged",
    "fallback",
    "rollback",
    "bad_step",
    "spike",
    "preempted",
    "config_changed",
    "waits_for_data",
    "irregular_data",
    "not_observed",
}


class MetricsFile:
    """`metrics.jsonl`, open for appending after the rows of steps up to `step` (rank 0)."""

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        self._file: TextIO = self._restart(step)

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows, so that a reader sees them at once."""
        self._file.write("".join(json.dumps(row) + "\n" for row in rows))
        self._file.flush()

    def sync(self) -> None:
        """Wait until what was appended is on disk: before a checkpoint that counts on it."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _restart(self, step: int) -> TextIO:
        partial = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        kept = [line for line, row in read_rows(self._path) if row["step"] <= step]
        file = open(partial, "w")  # noqa: SIM115  (stays open for appending)
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
        partial.rename(self._path)
        return file


def read_rows(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    """Lines of a metrics file and what they say; a last line that a killed process left unfinished is passed over."""
    if not path.exists():
        return
    with open(path) as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if line.endswith("\n") and isinstance(row, dict) and isinstance(row.get("step"), int):
                yield line, row


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append one object, in one write, behind a fragment that a full disk may have left; readers pass over that."""
    with open(path, "ab+") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        start = b"" if file.read(1) in (b"", b"\n") else b"\n"
        file.write(start + json.dumps(row).encode() + b"\n")


class Events:
    """`events.jsonl`: one object per event, with its time; safe to use from threads. Silent where `path` is None."""

    def __init__(self, path: Path | None, *, say: Any = print) -> None:
        self._path, self.say = path, say
        self._lock = threading.Lock()

    def __call__(self, event: str, **fields: Any) -> None:
        """Record an event; what a user should not miss is said on the terminal as well."""
        if self._path is None:
            return
        row = {"event": event, "time": round(time.time(), 3), **fields}
        with self._lock:
            try:
                append_row(self._path, row)
            except OSError as error:  # a full disk must not end the training
                self.say(f"events.jsonl cannot be written: {error.strerror}")
            if event in LOUD:
                self.say(f"{event}: " + ", ".join(f"{name} {value}" for name, value in fields.items()))
