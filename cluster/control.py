"""Ending jobs: cancel, stop, kill, on SLURM and on this machine.

Owns: asking a job to save and end, waiting for it, and ending it when it does not.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cluster import slurm
from cluster.locate import command_on, shown
from cluster.process import alive
from cluster.state import WAITING, states
from cluster.submission import Submission, latest
from configs import UserError

# How long a job may take to save after it was asked to, before it is ended.
_SAVE_PATIENCE_S = 180.0
_POLL_S = 0.3


def is_local(links: Sequence[Submission]) -> bool:
    return any((record := link.record()) is not None and record.executor == "local" for link in links)


def cancel(home: Path, *, now: bool) -> int:
    """End all jobs of a run. Returns the exit code.

    Args:
        now: do not ask them to save first.

    Raises:
        UserError: nothing of the run is under way, or it runs on another machine.
    """
    links = list(latest(home).values())
    current = states(links)
    under_way = [link for link in links if current[link].name in WAITING]
    if not under_way:
        raise UserError(f"{shown(home)}: nothing is queued or running; see {command_on('status', home)}")
    saving = [link for link in under_way if link.link == "pretrain" and current[link].name == "running" and not now]
    for link in reversed(under_way):  # else one that waits for another would start as that one ends
        if link in saving:
            with _not_to_come_back(link):
                ask_to_stop(link)
        else:  # an evaluation has nothing to save: it keeps the parts it has
            end_now(link)
    if saving:
        print("waiting for the save ...", flush=True)
        _await_end(saving)
    for link in under_way:
        link.write_outcome("cancelled", "by request")
        print(f"{link.link}: cancelled")
    return 0


def ask_to_stop(submission: Submission) -> None:
    """Tell the ranks to save and end."""
    record = submission.record()
    assert record is not None
    if record.executor == "slurm":
        slurm.send_usr2(record.job_id)
    else:
        _signal_supervisor(submission, signal.SIGTERM)


def end_now(submission: Submission) -> None:
    """End a job without a save."""
    record = submission.record()
    assert record is not None
    with _not_to_come_back(submission):
        if record.executor == "slurm":
            slurm.cancel([record.job_id])
        else:
            for _ in range(2):  # the second signal kills the ranks
                _signal_supervisor(submission, signal.SIGTERM)
                time.sleep(_POLL_S)
    submission.write_outcome("cancelled", "by request")


@contextmanager
def _not_to_come_back(submission: Submission) -> Iterator[None]:
    """Mark a job that is told to end inside as cancelled; one that cannot be told goes on as before."""
    submission.cancel_file.touch()
    try:
        yield
    except UserError:
        submission.cancel_file.unlink(missing_ok=True)
        raise


def _signal_supervisor(submission: Submission, number: signal.Signals) -> None:
    record = submission.record()
    assert record is not None
    if record.host != socket.gethostname():
        raise UserError(f"{submission.link} runs on {record.host}; give the command there")
    if alive(int(record.job_id), record.started_at):
        os.kill(int(record.job_id), number)


def _await_end(links: Sequence[Submission]) -> None:
    """Wait until the jobs have ended; end those that take too long."""
    deadline = time.monotonic() + _SAVE_PATIENCE_S
    while any(state.name in WAITING for state in states(links).values()):
        if time.monotonic() > deadline:
            for link in links:
                end_now(link)
            return
        time.sleep(_POLL_S)


def stop_local(links: Sequence[Submission]) -> None:
    """Stop local jobs with a save; a second Ctrl-C while waiting ends them at once."""
    for link in reversed(links):
        _signal_supervisor(link, signal.SIGTERM)
    try:
        while any(state.name in WAITING for state in states(links).values()):
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        for link in links:
            _signal_supervisor(link, signal.SIGTERM)
        while any(state.name in WAITING for state in states(links).values()):
            time.sleep(_POLL_S)
