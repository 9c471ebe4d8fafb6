"""Whether a job that ended comes back: the one rule for this machine and for SLURM.

Owns: the decision, and its use in the last lines of a SLURM batch script (`cluster/restarts.py SUBMISSION EXIT`), which
asks for the requeue that neither SLURM nor submitit gives to a job that failed.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
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
# A controller that is away (restart, fail-over) is waited for so long, and asked so often.
_CONTROLLER_PATIENCE_S, _ASK_AGAIN_S = 3600, 10
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
    objection = _patiently(lambda: slurm.why_not_requeue(slurm_job_id(), life))
    verdict = Verdict("over", objection) if objection else _judge(submission, life, arguments)
    print(f"[end of generation {submission.generation(life)}] {verdict.action}: {verdict.reason}", flush=True)
    if verdict.action == "restart":
        _patiently(lambda: slurm.requeue(slurm_job_id()))
    elif verdict.action == "failed":
        submission.write_outcome("failed", verdict.reason)
    elif verdict.reason == "cancelled":
        submission.write_outcome("cancelled", "by request")
    outcome = submission.outcome()
    return 0 if outcome is not None and outcome.status == "finished" else arguments.code or 1


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
    record = submission.record()
    cause = _cause(submission, slurm_job_id(), arguments.code)
    return decide(
        submission,
        submission.generation(life),
        "time limit, before all ranks had saved" if arguments.terminated else cause,
        preempted=arguments.code == PREEMPTED,
        max_restarts=record.max_restarts if record else 0,
    )


def _patiently(ask: Callable[[], Answer]) -> Answer:
    """SLURM's answer, asked for again while its controller is away (a restart, a fail-over).

    Raises:
        UserError: it stays away for longer than an hour.
    """
    end = time.monotonic() + _CONTROLLER_PATIENCE_S
    while True:
        try:
            return ask()
        except UserError as error:
            if time.monotonic() > end:
                raise
            print(f"{error}; asking again in {_ASK_AGAIN_S} s", flush=True)
            time.sleep(_ASK_AGAIN_S)


if __name__ == "__main__":
    raise SystemExit(run(main))
