"""What runs where: the tables of `launch.py status` and `list`, and the lines of `logs`.

Owns: their contents and layout. All is read from the run's folder and from SLURM or this machine's processes, so that
it works long after the launcher ended.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.locate import absolute, shown
from cluster.progress import Progress, duration, event_text
from cluster.state import WAITING, State, states
from cluster.submission import Submission, latest, read_lines
from cluster.tail import last_row
from configs import UserError


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    cells: tuple[str, ...]
    style: str = ""


_STYLES = {"running": "cyan", "finished": "green", "failed": "red", "lost": "red", "queued": "yellow"}


def find_home(name: str, runs_dir: str) -> Path:
    """The folder of a run by its name or path.

    Raises:
        UserError: there is none; names the nearest.
    """
    for candidate in (os.path.join(runs_dir, name), name):
        home = Path(absolute(candidate))
        if (home / "jobs").is_dir():
            return home
    from configs.models import nearest

    known = [shown(home) if home.parent != Path(runs_dir) else home.name for home in homes(runs_dir)]
    raise UserError(f"no run {name!r} in {shown(runs_dir)}" + nearest(name, known))


def homes(runs_dir: str) -> list[Path]:
    """Folders of all runs and evaluations, by the time of their newest submission."""
    roots = [Path(runs_dir).glob("*/jobs"), Path("results").glob("*/*/jobs")]
    found = [jobs.parent for root in roots for jobs in root]
    return sorted(found, key=lambda home: (home / "jobs").stat().st_mtime)


def progress_of(home: Path) -> Progress:
    """The newest figures of a run, of the length that its last start wrote down."""
    lengths = [row["steps"] for row in read_lines(home / "events.jsonl") if isinstance(row.get("steps"), int)]
    return Progress.of(home, lengths[-1] if lengths else None)


def run_rows(home: Path) -> list[Row]:
    """A line for each link of a run: state, where, progress, restarts."""
    links = latest(home)
    now = states(links.values())
    return [_link_row(submission, now[submission]) for submission in links.values()]


def broke(rows: Sequence[Row]) -> bool:
    """Whether nothing more will come of a run by itself, although not all of it finished."""
    found = {row.cells[1] for row in rows}
    return found.isdisjoint(WAITING) and found != {"finished"}


def _link_row(submission: Submission, state: State) -> Row:
    text = state.detail
    if submission.link == "pretrain":
        progress = progress_of(submission.home)
        text = "  ".join(part for part in (progress.text() if progress.figures else "", text) if part)
    restarts = max(0, len(submission.lives()) - 1)
    return Row((submission.link, state.name, state.where, str(restarts), text), _STYLES.get(state.name, ""))


def last_event(home: Path) -> str:
    """The newest event of a run and how long ago it was."""
    row = last_row(home / "events.jsonl")
    if row is None:
        return "none"
    ago = f" ({duration(time.time() - row['time'])} ago)" if "time" in row else ""
    return event_text(row) + ago


def list_rows(runs_dir: str) -> list[Row]:
    """A line for each run: how far it is."""
    runs = {home: list(latest(home).values()) for home in homes(runs_dir)}
    now = states(submission for links in runs.values() for submission in links)
    return [_home_row(home, [(link, now[link]) for link in links]) for home, links in runs.items()]


def _home_row(home: Path, links: Sequence[tuple[Submission, State]]) -> Row:
    if not links:
        return Row((shown(home), "lost", "", "never submitted"), "red")
    order = ("failed", "lost", "running", "queued", "stopped", "cancelled", "finished")
    link, worst = min(links, key=lambda pair: order.index(pair[1].name))
    progress = progress_of(home)
    text = progress.text() if progress.figures else ""
    return Row((shown(home), worst.name, link.link, text), _STYLES.get(worst.name, ""))


def print_table(columns: Sequence[str], rows: Sequence[Row]) -> None:
    """A table on the terminal; columns aligned by spaces elsewhere."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if console.is_terminal:
        table = Table(*columns, box=None, header_style="bold", pad_edge=False)
        for row in rows:
            table.add_row(*row.cells, style=row.style)
        console.print(table)
        return
    widths = [max(len(line[i]) for line in (columns, *(row.cells for row in rows))) for i in range(len(columns))]
    for line in (columns, *(row.cells for row in rows)):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def log_file(home: Path, link: str | None, rank: int) -> Path:
    """The log of one rank of a link (default: the newest link that has started), or what came before it could begin.

    Raises:
        UserError: it has none yet.
    """
    links = latest(home)
    if link is None:
        started = [submission for submission in links.values() if submission.lives()]
        link = started[-1].link if started else next(iter(links), "pretrain")
    path = home / "logs" / f"{link}.rank{rank}.log"
    if not path.exists():
        if rank == 0 and link in links and (early := links[link].early_logs()):
            return early[0]
        known = sorted(file.name for file in (home / "logs").glob("*.rank*.log"))
        raise UserError(f"no {shown(path)} yet" + (f"; there are {', '.join(known)}" if known else ""))
    return path


def stream(path: Path, *, lines: int, keep_on: bool) -> Iterator[str]:
    """The last lines of a log, then what is appended for as long as the reader wants."""
    from cluster.tail import last_lines

    with path.open(encoding="utf-8", errors="replace") as file:
        file.seek(0, os.SEEK_END)
        yield from last_lines(path, lines)
        line = ""
        while keep_on:
            line += file.readline()
            if line.endswith("\n"):
                yield line.rstrip("\n")
                line = ""
            else:  # nothing, or not all of it: Python writes a line and its end one after the other
                time.sleep(0.3)
