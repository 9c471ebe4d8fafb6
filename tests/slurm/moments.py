"""Moments in the life of a job at which a test strikes, and the strikes.

Owns: telling from outside (processes, files of the run) what a life of a job is doing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from cluster.submission import Submission, read_lines
from tests.slurm import nodes
from tests.slurm.conftest import PATIENCE_S, STEPS


@dataclass(frozen=True)
class Life:
    """The number-th start, from 0, of a submission that runs on four processes."""

    submission: Submission
    number: int

    @property
    def job(self) -> str:
        record = self.submission.record()
        assert record is not None
        return record.job_id

    def has_ranks(self) -> bool:
        """All processes are there; Python begins to import."""
        return len(list(nodes.ranks(self.job, self.number))) == 4

    def begun(self) -> float | None:
        """When rank 0 had opened its log, before it imports what does the work; None: not yet."""
        generation = self.submission.generation(self.number)
        return next((life["time"] for life in self.submission.lives() if life["generation"] == generation), None)

    def first_step(self) -> int | None:
        """Complete steps from which this life of a training went on; None: it does not train yet."""
        begun = self.begun()
        events = [] if begun is None else read_lines(self.submission.home / "events.jsonl")
        return next((row["step"] for row in events if row["event"] == "started" and row["time"] > begun), None)

    def trains(self) -> bool:
        """A few steps of this life are done."""
        first = self.first_step()
        return first is not None and len(read_lines(self.submission.home / "metrics.jsonl")) >= first + 3

    def saves(self) -> bool:
        """A checkpoint is half written."""
        return any((self.submission.home / "checkpoints").glob(".step_*.partial")) and self.first_step() is not None

    def exports(self) -> bool:
        """All steps are done and saved, and the job is not over."""
        last = self.submission.home / "checkpoints" / f"step_{STEPS:08d}"
        return last.exists() and self.first_step() is not None and self.submission.outcome() is None


MOMENTS: dict[str, Callable[[Life], bool]] = {
    "ranks start": Life.has_ranks,
    "importing": lambda life: life.begun() is not None,
    "training": Life.trains,
    "saving": Life.saves,
    "exporting": Life.exports,
}
STRIKES: dict[str, Callable[[Life], object]] = {
    "signal": lambda life: nodes.command("scancel", "--signal=USR2", life.job),
    "signal to all": lambda life: nodes.command("scancel", "--signal=USR2", "--full", life.job),
    "requeue": lambda life: nodes.command("scontrol", "requeue", life.job),
    "kill first": lambda life: nodes.kill_rank(life.job, 0, life.number),
    "kill last": lambda life: nodes.kill_rank(life.job, 3, life.number),
    "kill script": lambda life: nodes.kill_script(life.job),
    "crash first": lambda life: nodes.fault("crash", nodes.nodes_of(life.job)[0]),
    "crash second": lambda life: nodes.fault("crash", nodes.nodes_of(life.job)[1]),
    "heal": lambda life: nodes.start_all(),
}
# Moments that last some milliseconds are looked for that often.
_POLL_S = {"saving": 0.002, "exporting": 0.02}


def strike(submission: Submission, life: int, moment: str, what: str) -> None:
    """Wait for the moment in the life-th start of a submission, then strike."""
    target = Life(submission, life)
    end = time.monotonic() + PATIENCE_S
    while not MOMENTS[moment](target):
        assert time.monotonic() < end, f"{submission.folder.name}: life {life} never came to {moment}"
        time.sleep(_POLL_S.get(moment, 0.3))
    STRIKES[what](target)
