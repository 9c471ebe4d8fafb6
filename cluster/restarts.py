"""Whether a job that ended comes back: the one rule for this machine and for SLURM.

Owns: the decision, and its use in the last lines of a SLURM batch script (`cluster/restarts.py SUBMISSION EXIT`), which
asks for the requeue that neither SLURM nor submitit gives to a job that failed. Of a script that was killed itself,
rank 0 takes the place.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import contextlib
import errno
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from cluster import slurm
from cluster.submission import Submission
from cluster.tail import last_lines
from configs.errors import UserError, run

Answer = TypeVar("Answer")

# Exit code of a rank that saved its state because it was told to end, and wants to go on later. 75 is the watchdog's.
PREEMPTED = 85
# A controller that is away (restart, fail-over) and a full disk are waited for so long, and tried so often.
_PATIENCE_S, _TRY_AGAIN_S = 3600, 10
_FULL = (errno.ENOSPC, errno.EDQUOT)
_CAUSE = re.compile(r"srun: error: (\S+: tasks? [\d,-]+: (?!Terminated).*)")


@dataclass(frozen=True)
class Verdict:
    """restart: start again from disk. over: nothing to do. failed: give up. fenced: a younger life runs."""

    action: Literal["restart", "over", "failed", "fenced"]
    reason: str = ""


def stuck(failures: Sequence[Mapping[str, Any]]) -> int:
    """How many of the last failures, in a row, happened at the same progress as the very last one."""
    count = 0
    for failure in reversed(failures):
        if failure["progress"] != failures[-1]["progress"]:
            break
        count += 1
    return count


def decide(submission: Submission, generation: int, exits: str, *, preempted: bool, max_restarts: int) -> Verdict:
    """Judge the end of one life and write down a failure, if it was one.

    Args:
        generation: of the life that ended.
        exits: exit codes as a person would read them, e.g. "rank 1: killed by signal 9".
        preempted: the ranks saved and ended because they were told to.
        max_restarts: restarts without progress in between before giving up.
    """
    if submission.is_replaced(generation):
        return Verdict("fenced", "a younger life of this job runs")
    if submission.outcome() is not None:
        return Verdict("over")
    if submission.cancel_file.exists():
        return Verdict("over", "cancelled")
    if preempted:
        return Verdict("restart", "saved on request")
    submission.add_failure(generation, exits)
    count = stuck(submission.failures())
    if count > max_restarts:
        times = "once" if max_restarts == 0 else f"{count} times in a row"
        return Verdict("failed", f"broke {times} without progress in between (last: {exits})")
    return Verdict("restart", f"{exits}; restart {count} of at most {max_restarts} without progress")


def main(argv: Sequence[str] | None = None) -> int:
    """End of a SLURM batch script: requeue the job or let it end. Returns the exit code the script shall have."""
    parser = argparse.ArgumentParser(description="Decide whether a SLURM job that ended is requeued.")
    parser.add_argument("submission", type=Path)
    parser.add_argument("code", type=int, help="exit code of srun")
    parser.add_argument("--terminated", action="store_true", help="SLURM told the script to end")
    arguments = parser.parse_args(argv)
    submission = Submission(arguments.submission)
    life = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    objection = patiently(lambda: slurm.why_not_requeue(slurm_job_id(), life))
    verdict = Verdict("over", objection) if objection else patiently(lambda: _judge(submission, life, arguments))
    _carry_out(verdict, submission, life)
    outcome = submission.outcome()
    return 0 if outcome is not None and outcome.status == "finished" else arguments.code or 1


def stand_in(submission: Submission, life: int) -> None:
    """In rank 0, when SLURM tells the ranks to end: requeue the job if that is because its batch script was killed."""
    try:
        if slurm.lost_its_script(slurm_job_id(), life):
            cause = f"the batch script of SLURM job {slurm_job_id()} was killed"
            _carry_out(_decide(submission, life, cause), submission, life)
    except UserError as error:
        say(f"no requeue in place of the batch script: {error}")


def _carry_out(verdict: Verdict, submission: Submission, life: int) -> None:
    say(f"[end of generation {submission.generation(life)}] {verdict.action}: {verdict.reason}")
    if verdict.action == "restart":
        patiently(lambda: slurm.requeue(slurm_job_id()))
    elif verdict.action == "failed":
        patiently(lambda: submission.write_outcome("failed", verdict.reason))
    elif verdict.reason == "cancelled":
        patiently(lambda: submission.write_outcome("cancelled", "by request"))


def slurm_job_id() -> str:
    """What SLURM calls this job: of an array only this task."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def _cause(submission: Submission, job_id: str, code: int) -> str:
    """What srun said first of this life's end, e.g. "n2: task 3: Killed", else its exit code."""
    log = submission.submitit_folder / f"{job_id}_0_log.out"
    said = [line for line in last_lines(log, 200) if line.startswith(("[end of", "srun: error:"))]
    for line in said[max((i + 1 for i, line in enumerate(said) if line.startswith("[")), default=0) :]:
        if (match := _CAUSE.match(line)) is not None:
            return f"{match.group(1)} in SLURM job {job_id}"
    return f"exit code {code} in SLURM job {job_id}"


def _judge(submission: Submission, life: int, arguments: argparse.Namespace) -> Verdict:
    """The verdict on a life that is still this script's business."""
    cause = _cause(submission, slurm_job_id(), arguments.code)
    exits = "time limit, before all ranks had saved" if arguments.terminated else cause
    return _decide(submission, life, exits, preempted=arguments.code == PREEMPTED)


def _decide(submission: Submission, life: int, exits: str, *, preempted: bool = False) -> Verdict:
    record = submission.record()
    max_restarts = record.max_restarts if record else 0
    return decide(submission, submission.generation(life), exits, preempted=preempted, max_restarts=max_restarts)


def patiently(attempt: Callable[[], Answer], *, stopped: Callable[[], bool] = lambda: False) -> Answer:
    """What an attempt returns, made again while SLURM's controller is away (a restart, a fail-over) or a disk is full.

    Args:
        stopped: whether to give up early.

    Raises:
        UserError, OSError: the last attempt's, after an hour.
    """
    end = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return attempt()
        except (UserError, OSError) as error:
            passes = isinstance(error, UserError) or error.errno in _FULL
            if not passes or time.monotonic() > end or stopped():
                raise
            say(f"{error}; trying again in {_TRY_AGAIN_S} s")
            time.sleep(_TRY_AGAIN_S)


def say(text: str) -> None:
    """Print a line, if the disk has room for it."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


if __name__ == "__main__":
    raise SystemExit(run(main))
