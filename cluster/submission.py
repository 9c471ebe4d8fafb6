"""Submissions: what was handed to an executor for a run, and what became of it.

Owns: the folder HOME/jobs/NNNN_LINK/ and its files. HOME is a run's folder (or, for an evaluation of something that is
no run, the folder of its results). Everything that the launcher, the jobs and the status commands know of each other
lies here, so that any of them can die without the others losing track:

    record.json     written once, by the launcher: which link, which executor, where, job id, what it waits for
    config.yaml     the configuration as it was then (a pretraining runs by HOME/config.yaml)
    lives.jsonl     one line for each start of the job: generation, time, host, world size
    failures.jsonl  one line for each life that broke: generation, checkpoint step at that time, exit codes
    outcome.json    the end: finished, failed, cancelled or stopped; absent while the job may still run
    submitit/       submitit's own files: pickle, results, what a rank printed before its log was open
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.tail import as_row
from configs import UserError

Status = Literal["finished", "failed", "cancelled", "stopped"]

# Generations rise over all lives of a run: submission number * LIVES_PER_SUBMISSION + life.
LIVES_PER_SUBMISSION = 100_000

_CHECKPOINT = re.compile(r"step_(\d+)")
_FOLDER = re.compile(r"(\d{4,})_(.+)")


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees all of it or none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, without fragments: a line that is being written, or was cut by a full disk."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [row for line in lines if line.endswith(b"\n") and (row := as_row(line)) is not None]


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append one object to a JSON-lines file, in one write, behind a fragment that a full disk may have left."""
    with path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        start = b"" if file.read(1) in (b"", b"\n") else b"\n"
        file.write(start + json.dumps(row).encode() + b"\n")


@dataclass(frozen=True)
class Record:
    """What is known when a submission has been handed over."""

    link: str  # "pretrain", or the name of a downstream job
    job: str  # which schema its configuration has: "pretrain", "object_discovery", ...
    executor: Literal["slurm", "local"]
    job_id: str  # SLURM's, e.g. "123" or "123_4" in an array; locally the supervisor's process id
    host: str  # where the launcher ran; locally also where the job runs
    started_at: float  # start time of the local supervisor in clock ticks since boot, against reused process ids
    submitted: float  # seconds since the epoch
    code: str  # folder of the code snapshot
    nodes: int
    processes: int  # per node
    max_restarts: int  # restarts without progress before giving up
    after: tuple[str, ...] = ()  # folder names of the submissions it waits for
    folder: str = ""  # its own folder then


@dataclass(frozen=True)
class Outcome:
    """How a submission ended."""

    status: Status
    reason: str = ""
    time: float = 0.0


@dataclass(frozen=True)
class Submission:
    """One folder HOME/jobs/NNNN_LINK."""

    folder: Path

    @property
    def home(self) -> Path:
        return self.folder.parents[1]

    @property
    def number(self) -> int:
        return int(self.folder.name.partition("_")[0])

    @property
    def link(self) -> str:
        return self.folder.name.partition("_")[2]

    @property
    def submitit_folder(self) -> Path:
        return self.folder / "submitit"

    def generation(self, life: int) -> int:
        """The number of the life-th start (from 0) of this submission; rises over all lives of the run."""
        return self.number * LIVES_PER_SUBMISSION + life

    def write_record(self, record: Record) -> None:
        write_atomically(self.folder / "record.json", json.dumps(asdict(record), indent=1) + "\n")

    def record(self) -> Record | None:
        """The record, or None where the launcher died before it had submitted."""
        data = self._read("record.json")
        return None if data is None else Record(**{**data, "after": tuple(data["after"])})

    def is_copy(self, record: Record) -> bool:
        """Whether the run's folder was copied, so that the job belongs to another run."""
        return os.path.isdir(record.folder) and not os.path.samefile(record.folder, self.folder)

    def outcome(self) -> Outcome | None:
        data = self._read("outcome.json")
        return None if data is None else Outcome(**data)

    def _read(self, name: str) -> dict[str, Any] | None:
        """The object in a file of this folder; None where there is none, or a disk has lost it."""
        try:
            return as_row((self.folder / name).read_bytes())
        except FileNotFoundError:
            return None

    def write_outcome(self, status: Status, reason: str = "") -> None:
        """Declare the submission over. A submission that finished stays finished."""
        before = self.outcome()
        if before is None or before.status != "finished":
            row = asdict(Outcome(status, reason, time.time()))
            write_atomically(self.folder / "outcome.json", json.dumps(row) + "\n")

    @property
    def cancel_file(self) -> Path:
        """Its presence asks the job to save and end, and not to come back."""
        return self.folder / "cancel"

    def lives(self) -> list[dict[str, Any]]:
        return read_lines(self.folder / "lives.jsonl")

    def is_replaced(self, generation: int) -> bool:
        """Whether a younger life than this one has started."""
        return any(life["generation"] > generation for life in self.lives())

    def failures(self) -> list[dict[str, Any]]:
        return read_lines(self.folder / "failures.jsonl")

    def add_life(self, generation: int, **row: Any) -> None:
        append_line(self.folder / "lives.jsonl", {"generation": generation, "time": time.time(), **row})

    def add_failure(self, generation: int, exits: str) -> None:
        row = {"generation": generation, "time": time.time(), "progress": self.progress(), "exits": exits}
        append_line(self.folder / "failures.jsonl", row)

    def early_logs(self) -> list[Path]:
        """What was printed before rank 0 had opened its log: by the batch script or the supervisor, and by Python."""
        record = self.record()
        job_id = record.job_id if record else "*"
        found = [*sorted(self.submitit_folder.glob(f"{job_id}_*_log.out")), self.folder / "supervisor.log"]
        return [path for path in found if path.exists() and path.stat().st_size]

    def progress(self) -> int:
        """What a restart would not have to do again: the newest checkpoint's step, or the files of partial results."""
        if self.link == "pretrain":
            return newest_step(self.home)
        return sum(1 for path in (self.home / "downstream" / self.link).glob("**/*") if path.is_file())


def newest_step(home: Path) -> int:
    """Complete steps of a run's newest checkpoint; 0 without one."""
    names = (_CHECKPOINT.fullmatch(path.name) for path in (home / "checkpoints").glob("step_*"))
    return max((int(match.group(1)) for match in names if match), default=0)


def submissions(home: Path) -> list[Submission]:
    """All submissions of a run, oldest first."""
    folders = (path for path in (home / "jobs").glob("*") if _FOLDER.fullmatch(path.name) and path.is_dir())
    return sorted((Submission(path) for path in folders), key=lambda submission: submission.number)


def latest(home: Path) -> dict[str, Submission]:
    """The newest submission of each link, in the order in which the links were first submitted."""
    return {submission.link: submission for submission in submissions(home) if submission.record() is not None}


def new_submission(home: Path, link: str) -> Submission:
    """Make the folder of the next submission. Creating it takes the number, for one launcher only."""
    number = max((submission.number for submission in submissions(home)), default=-1) + 1
    folder = home / "jobs" / f"{number:04d}_{link}"
    folder.mkdir(parents=True)
    return Submission(folder)


@contextmanager
def hold(home: Path) -> Iterator[None]:
    """Hold the run while something is submitted for it: of two launchers at once, one is refused.

    Raises:
        UserError: another launcher is at work on this run, or nothing can be written there.
    """
    import fcntl

    try:
        home.mkdir(parents=True, exist_ok=True)
        opened = (home / ".launching").open("w")
    except OSError as error:
        raise UserError(f"{home} cannot be written: {error.strerror}; choose another place with runs_dir=...") from None
    with opened as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{home}: another launch of this run is at work; wait for it, or choose another name="
            ) from None
        except OSError:
            pass  # a file system without locks: the lease still keeps two lives from writing at once
        yield
