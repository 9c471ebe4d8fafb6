"""What a run has reached, from its metrics and events, in the words and numbers of one line.

Owns: `Progress`, kept up to date from new rows, and its formatting. Pure but for the reading of the files.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.tail import JsonTail, last_rows

# Keys of an event that its line does not repeat.
_NOT_SHOWN = frozenset({"time", "event", "step", "steps", "generation", "rank", "zero_stage", "stream", "kernels"})
# Events that the launcher tells in its own words.
_TOLD = frozenset({"finished", "saved"})
# Rows whose steps tell the speed.
_RECENT = 64


@dataclass
class Progress:
    """The newest step of a training, its figures, and its speed over the last rows seen."""

    steps: int | None = None
    step: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    _step_s: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))

    @classmethod
    def of(cls, home: Path, steps: int | None) -> Progress:
        """What a run of so many steps has reached, by the last rows of its metrics."""
        progress = cls(steps)
        progress.take_in(last_rows(home / "metrics.jsonl", _RECENT))
        return progress

    def take_in(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take in rows of metrics.jsonl."""
        for row in rows:
            if "step" in row:
                self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        """Take in a row of metrics.jsonl, which tells of a complete step."""
        self.step = int(row["step"])
        self.figures.update({key: float(value) for key, value in row.items() if isinstance(value, int | float)})
        if isinstance(row.get("step_s"), float):
            self._step_s.append(row["step_s"])

    @property
    def seconds_left(self) -> float | None:
        """At the speed of the last rows; None where that is not known."""
        if self.steps is None or not self._step_s:
            return None
        return (self.steps - self.step) * statistics.median(self._step_s)

    def text(self) -> str:
        """Step, loss, speed and time left in one line, without what is not known."""
        total = f"/{self.steps}" if self.steps else ""
        parts = [f"step {self.step}{total}"]
        for key, form in (("loss", "loss {:.4f}"), ("views_per_s", "{:,.0f} views/s")):
            value = self.figures.get(key)
            if value is not None and math.isfinite(value):
                parts.append(form.format(value))
        wait = self.figures.get("data_wait_s")
        if wait is not None and wait > 0.05:
            parts.append(f"data wait {wait:.2f} s")
        if self.seconds_left:
            parts.append(f"{duration(self.seconds_left)} left")
        return "  ".join(parts)


class RunReader:
    """Follows metrics.jsonl and events.jsonl of a run."""

    def __init__(self, home: Path, steps: int | None) -> None:
        self._metrics = JsonTail(home / "metrics.jsonl").skip()
        self.progress = Progress.of(home, steps)
        self._events = JsonTail(home / "events.jsonl").skip()

    def read(self) -> list[str]:
        """Take in what is new; returns a line for each new event worth showing."""
        self.progress.take_in(self._metrics.read())
        lines = []
        for row in self._events.read():
            if isinstance(row.get("steps"), int):
                self.progress.steps = row["steps"]
            if row.get("event") not in _TOLD:
                lines.append(event_text(row))
        return [line for line in lines if line]


def event_text(row: dict[str, Any]) -> str:
    """An event as a line: its name, at which step, and what it says."""
    name = str(row.get("event", ""))
    at = f" at step {row['step']}" if "step" in row else ""
    details = ", ".join(f"{key} {_short(value)}" for key, value in row.items() if key not in _NOT_SHOWN)
    return f"{name}{at}" + (f": {details}" if details else "")


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return text if len(text) <= 240 else text[:237] + "..."


def duration(seconds: float) -> str:
    """Seconds in the two largest units: "2 d 3 h", "4 min 5 s"."""
    rest = max(0, round(seconds))
    for unit, size, smaller, small in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if rest >= size:
            return f"{rest // size} {unit} {rest % size // small} {smaller}"
    return f"{rest} s"
