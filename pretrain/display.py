"""The screen of a training: one progress bar on a terminal, plain lines elsewhere.

Owns: what a step looks like in words. Rank 0 only.
"""

from __future__ import annotations

import sys
from typing import Any

SHOWN = ("loss", "accuracy", "grad_norm", "lr", "views_per_s")


def line(row: dict[str, Any], steps: int) -> str:
    """A row of metrics as one plain line."""
    figures = "  ".join(f"{name} {figure(row[name])}" for name in SHOWN if row.get(name) is not None)
    waiting = f"  data {row['data_wait_s']:.2f} s" if row.get("data_wait_s", 0) > 0.1 * row.get("step_s", 1) else ""
    return f"step {row['step']}/{steps}  {figures}{waiting}"


def figure(value: float) -> str:
    """A number in four significant digits, without superfluous ones."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


class Display:
    """Shows rows as they come; on a terminal through rich."""

    def __init__(self, name: str, start: int, steps: int, *, enabled: bool) -> None:
        self._steps, self._enabled = steps, enabled
        self._progress: Any = None
        if enabled and sys.stdout.isatty():
            self._progress, self._task = _bar(name, start, steps)

    def show(self, row: dict[str, Any]) -> None:
        """Show the newest row."""
        if self._progress is not None:
            text = "  ".join(f"{name} {figure(row[name])}" for name in SHOWN if row.get(name) is not None)
            self._progress.update(self._task, completed=row["step"], figures=text)
        elif self._enabled:
            print(line(row, self._steps), flush=True)

    def say(self, text: str) -> None:
        """Say something above the bar."""
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False)
        elif self._enabled:
            print(text, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._progress is not None:
            self._progress.stop()


def _bar(name: str, start: int, steps: int) -> tuple[Any, Any]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    task = progress.add_task(name, total=steps, completed=start, figures="")
    progress.start()
    return progress, task
