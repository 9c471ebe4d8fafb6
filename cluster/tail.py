"""Reading files that grow: metrics, events and logs, from where the last look ended.

Owns: following a JSON-lines file over what happens to it: half-written last lines, rows cut off by a rollback.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class JsonTail:
    """New rows of a JSON-lines file at each call of `read`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0

    def skip(self) -> JsonTail:
        """Begin at the present end of the file."""
        self._offset = self.path.stat().st_size if self.path.exists() else 0
        return self

    def read(self) -> list[dict[str, Any]]:
        """Rows since the last call. After a rollback has cut the file, those from the cut on."""
        try:
            size = self.path.stat().st_size
            if size < self._offset:
                self._offset = size
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [row for line in whole.splitlines() if (row := as_row(line)) is not None]


def as_row(line: bytes) -> dict[str, Any] | None:
    """One row, or None for a fragment (a cut in the middle of what was read before)."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def last_row(path: Path) -> dict[str, Any] | None:
    """The newest whole row of a JSON-lines file, read from its end."""
    rows = last_rows(path, 1)
    return rows[-1] if rows else None


def last_rows(path: Path, count: int) -> list[dict[str, Any]]:
    """The newest `count` whole rows, oldest first."""
    lines = last_lines(path, count + 1)
    return [row for line in lines if (row := as_row(line.encode())) is not None][-count:]


def last_lines(path: Path, count: int) -> list[str]:
    """The last `count` lines of a text file, without reading all of it."""
    block = 1 << 14
    try:
        with path.open("rb") as file:
            end = file.seek(0, 2)
            start, data = end, b""
            while start > 0 and data.count(b"\n") <= count:
                start = max(0, start - block)
                file.seek(start)
                data = file.read(end - start)
    except OSError:
        return []
    lines = data.decode("utf-8", "replace").splitlines()
    return lines[max(0, len(lines) - count) :]
