"""Following a run at the prompt: a live line on a terminal, plain lines elsewhere, until it is over or Ctrl-C.

Owns: what the user sees after a launch. It only reads: nothing of the run depends on it, and it can start or end at any
time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from cluster.locate import shown
from cluster.progress import RunReader, duration
from cluster.state import WAITING, State, states
from cluster.submission import Submission
from cluster.tail import last_lines
from configs import UserError

# A plain line at most so often; what is news comes at once.
_PLAIN_EVERY_S = 10.0
_LOCAL_POLL_S, _SLURM_POLL_S, _OUTAGE_POLL_S = 0.3, 2.0, 10.0
_LOG_LINES = 15
_STARTING = "starting"


class Screen(Protocol):
    """Where progress is shown."""

    def say(self, text: str) -> None: ...

    def progress(self, link: str, text: str, done: int, total: int | None) -> None: ...

    def end(self, link: str) -> None: ...


class PlainScreen:
    """Lines, for files and pipes: progress at most every ten seconds."""

    def __init__(self) -> None:
        self._last = -float("inf")
        self._shown = ""

    def say(self, text: str) -> None:
        print(text, flush=True)

    def progress(self, link: str, text: str, done: int, total: int | None) -> None:
        finished = total is not None and done >= total
        due = time.monotonic() - self._last >= _PLAIN_EVERY_S or finished
        if due and text not in (self._shown, _STARTING):
            print(f"{link}: {text}", flush=True)
            self._last, self._shown = time.monotonic(), text

    def end(self, link: str) -> None:
        self._last = -float("inf")


class LiveScreen:
    """A bar for each running job at the bottom of the terminal, lines above."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24))
        self.bar = Progress(*columns, TextColumn("{task.fields[text]}"), transient=True)
        self._tasks: dict[str, Any] = {}

    def say(self, text: str) -> None:
        self.bar.console.print(text, highlight=False, markup=False)

    def progress(self, link: str, text: str, done: int, total: int | None) -> None:
        if link not in self._tasks:
            self._tasks[link] = self.bar.add_task(link, total=total, text=text)
        self.bar.update(self._tasks[link], completed=done, total=total, text=text)

    def end(self, link: str) -> None:
        if link in self._tasks:
            self.bar.remove_task(self._tasks.pop(link))


def follow(home: Path, links: Sequence[Submission], steps: int | None) -> dict[str, State]:
    """Show what happens until all submissions are over. Returns their states by link.

    Raises:
        KeyboardInterrupt: the user has seen enough; the job goes on.
    """
    live = LiveScreen() if sys.stdout.isatty() else None
    screen: Screen = live or PlainScreen()
    around: AbstractContextManager[Any] = live.bar if live else nullcontext()
    with around:
        return _follow(home, links, steps, screen)


def _follow(home: Path, links: Sequence[Submission], steps: int | None, screen: Screen) -> dict[str, State]:
    reader = RunReader(home, steps)
    seen: dict[str, tuple[str, str]] = {}
    generations: dict[str, int] = {}
    while True:
        now = _states(links, screen)
        for line in reader.read():
            screen.say(line)
        for submission in links:
            _tell_lives(submission, generations, screen)
            state = now[submission]
            if state.name == "running":
                _show_running(submission, reader, screen)
            else:
                screen.end(submission.link)
            if seen.get(submission.link) != (state.name, state.detail):
                seen[submission.link] = (state.name, state.detail)
                _tell_state(submission, state, reader, screen)
        if all(state.name not in WAITING for state in now.values()):
            return {submission.link: now[submission] for submission in links}
        on_slurm = any((record := link.record()) is not None and record.executor == "slurm" for link in links)
        time.sleep(_SLURM_POLL_S if on_slurm else _LOCAL_POLL_S)


def _states(links: Sequence[Submission], screen: Screen) -> dict[Submission, State]:
    """States of the links; while SLURM's controller does not answer, the last resort is patience."""
    told = False
    while True:
        try:
            return states(links)
        except UserError as error:
            if not told:
                screen.say(f"{error}\nasking again; the job needs no answer to go on, and Ctrl-C ends only this view")
                told = True
            time.sleep(_OUTAGE_POLL_S)


def _show_running(submission: Submission, reader: RunReader, screen: Screen) -> None:
    """The bar of the running link: steps of a pretraining, the newest line of the log of anything else."""
    if submission.link == "pretrain":
        progress = reader.progress
        text = progress.text() if progress.figures else _STARTING
        screen.progress(submission.link, text, progress.step, progress.steps)
        return
    lines = [line for line in last_lines(submission.home / "logs" / f"{submission.link}.log", 5) if line.strip()]
    text = lines[-1][:100] if lines and not lines[-1].startswith("---") else _STARTING
    screen.progress(submission.link, text, 0, None)


def _tell_lives(submission: Submission, generations: dict[str, int], screen: Screen) -> None:
    """Say that a job has started again, and why."""
    lives = submission.lives()
    before = generations.setdefault(submission.link, len(lives))
    if len(lives) > max(before, 1):
        failures = submission.failures()
        reason = f" after: {failures[-1]['exits']}" if failures else ""
        screen.say(f"{submission.link}: started again on {lives[-1]['host']}{reason}")
    generations[submission.link] = max(before, len(lives))


def _tell_state(submission: Submission, state: State, reader: RunReader, screen: Screen) -> None:
    link = submission.link
    if state.name == "finished":
        took = _took(submission)
        text = f"  {reader.progress.text()}" if link == "pretrain" and reader.progress.figures else ""
        screen.say(f"{link}: finished{took}{text}")
    elif state.name == "running":
        screen.say(f"{link}: running ({state.where})")
    elif state.name == "queued" and state.detail:
        screen.say(f"{link}: queued ({state.detail})")
    elif state.name in ("failed", "lost"):
        screen.say(f"{link}: {state.name}: {state.detail}")
        log = submission.home / "logs" / f"{link}.log"
        if not log.exists():
            log = next(iter(submission.early_logs()), log)
        for line in last_lines(log, _LOG_LINES):
            screen.say(f"  | {line}")
        screen.say(f"  all of it: {shown(log)}")
    elif state.name in ("cancelled", "stopped"):
        screen.say(f"{link}: {state.name}" + (f" ({state.detail})" if state.detail else ""))


def _took(submission: Submission) -> str:
    lives, outcome = submission.lives(), submission.outcome()
    if not lives or outcome is None:
        return ""
    return f" in {duration(outcome.time - lives[0]['time'])}"
