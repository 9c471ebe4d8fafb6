"""The state of a submission, from what lies on disk and from who would know whether its job is alive.

Owns: the joining of record and outcome with SLURM's queue or this machine's processes.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from cluster import slurm
from cluster.process import alive
from cluster.submission import Record, Submission

StateName = Literal["queued", "running", "finished", "failed", "cancelled", "stopped", "lost"]

# States in which something may still come of the job by itself.
WAITING = ("queued", "running")
# A job of another machine counts as running while it has written within this time.
_FRESH_S = 180.0


@dataclass(frozen=True)
class State:
    """What has become of a submission."""

    name: StateName
    where: str = ""  # job and nodes, or host and process
    detail: str = ""  # why it waits, or how it ended


def state_of(submission: Submission) -> State:
    """The state of one submission."""
    return states([submission])[submission]


def states(wanted: Iterable[Submission]) -> dict[Submission, State]:
    """States of several submissions, also of several runs, asking SLURM once."""
    records = {submission: submission.record() for submission in wanted}
    open_ids = [
        record.job_id
        for submission, record in records.items()
        if record and record.executor == "slurm" and submission.outcome() is None
    ]
    entries = slurm.queue(open_ids)
    return {submission: _state(submission, record, entries) for submission, record in records.items()}


def _state(submission: Submission, record: Record | None, entries: Mapping[str, slurm.QueueEntry]) -> State:
    if record is None:
        return State("lost", detail="the launcher ended before it had submitted")
    outcome = submission.outcome()
    if outcome is not None:
        return State(outcome.status, _where(record), outcome.reason)
    if submission.is_copy(record):
        return State("lost", _where(record), f"the job is that of {record.folder}, of which this is a copy")
    if record.executor == "slurm":
        return _slurm_state(record, entries.get(record.job_id))
    return _local_state(submission, record)


def _where(record: Record) -> str:
    return f"SLURM job {record.job_id}" if record.executor == "slurm" else f"{record.host}, process {record.job_id}"


def _slurm_state(record: Record, entry: slurm.QueueEntry | None) -> State:
    if entry is None:
        return State("lost", _where(record), "SLURM does not know the job any more")
    if entry.state in slurm.RUNNING:
        return State("running", f"{_where(record)} on {entry.nodes}")
    if entry.state in slurm.QUEUED:
        return State("queued", _where(record), entry.reason)
    ended: StateName = "cancelled" if entry.state.startswith("CANCELLED") else "lost"
    return State(ended, _where(record), f"SLURM says {entry.state}")


def _local_state(submission: Submission, record: Record) -> State:
    if record.host == socket.gethostname():
        if not alive(int(record.job_id), record.started_at):
            return State("lost", _where(record), "its supervisor is gone without a word (killed, or a reboot)")
    elif not _fresh(submission):
        return State("lost", _where(record), f"on another machine; nothing written for {_FRESH_S:.0f} s")
    return State("running" if submission.lives() else "queued", _where(record))


def _fresh(submission: Submission) -> bool:
    """Whether anything of the run was written lately."""
    files = [submission.home / "metrics.jsonl", submission.home / "owner.json", submission.folder / "record.json"]
    newest = max((path.stat().st_mtime for path in files if path.exists()), default=0.0)
    return time.time() - newest < _FRESH_S
