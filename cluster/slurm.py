"""What SLURM's own commands say and do: states, limits, requeue, cancel, signal.

Owns: every call of squeue, sacct, sinfo, scontrol and scancel, and the reading of their output. Submission itself goes
through submitit (executor.py).
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, replace

from configs import UserError

# A job in one of these states runs, or will run (again); in any other it is over.
RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "SIGNALING", "STAGE_OUT", "STOPPED", "RESIZING")
QUEUED = (
    *("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED"),
    *("PREEMPTED", "SPECIAL_EXIT", "RESV_DEL_HOLD", "NODE_FAIL"),
)
_PATIENCE_S = 30
# Why a job is over whose batch script was killed: what SLURM 22.05 says, what later ones say, the kernel's killer.
_SCRIPT_KILLED = ("JobLaunchFailure", "RaisedSignal", "OutOfMemory")


@dataclass(frozen=True)
class QueueEntry:
    """A job as SLURM sees it."""

    state: str  # PENDING, RUNNING, COMPLETED, FAILED, ...
    reason: str = ""  # why it waits
    nodes: str = ""


@dataclass(frozen=True)
class Partition:
    """What a partition offers. Numbers are those of its largest node."""

    name: str
    up: bool
    time_min: int | None  # time limit in minutes; None: none
    nodes: int
    cpus: int
    memory_mb: int
    gpus: dict[str, int]  # by type as SLURM names it; "" where it has no type


def _output(*command: str) -> str:
    """Standard output of a SLURM command.

    Raises:
        UserError: the command is missing, failed or did not answer.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S)
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not there: load SLURM's module, or use cluster.executor=local") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"SLURM did not answer `{' '.join(command)}` within {_PATIENCE_S} s; try again later") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise UserError(f"`{' '.join(command)}` failed: {''.join(said)}")
    return done.stdout


@functools.cache  # each link of a run asks, and a busy controller takes its time
def available() -> bool:
    """Whether this machine belongs to a SLURM cluster: its commands are there and know a configuration.

    Raises:
        UserError: SLURM is configured here but its controller does not answer.
    """
    if shutil.which("sbatch") is None:
        return False
    done = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=_PATIENCE_S)
    if done.returncode == 0 and " UP" in done.stdout:
        return True
    if "DOWN" in done.stdout:
        raise UserError("SLURM's controller does not answer (`scontrol ping`): wait, or use cluster.executor=local")
    return False


def queue(job_ids: Iterable[str]) -> dict[str, QueueEntry]:
    """States of the given jobs, by job id ("123", or "123_4" for a task of an array). Unknown ones are left out."""
    wanted = sorted(set(job_ids))
    if not wanted:
        return {}
    # squeue knows better while a job is there: accounting lags behind, and after a node failure it says that the job
    # is over although it waits to run again. When squeue has forgotten a job, nothing more will come of it.
    entries = {
        key: replace(entry, state=f"{entry.state} and has it no longer in the queue")
        if entry.state in (*RUNNING, *QUEUED)
        else entry
        for key, entry in _accounting(wanted).items()
    }
    form = "%i|%F_%K|%T|%r|%N"
    command = ["squeue", "--noheader", "--array", "--states=all", f"--format={form}"]
    try:
        text = _output(*command, f"--jobs={','.join(wanted)}")
    except UserError as error:  # a job that is long over is an error to squeue
        if "Invalid job id" not in str(error):
            raise
        text = ""
    for line in text.splitlines():
        job_id, array_id, state, reason, nodes = line.split("|")
        for key in (job_id, array_id):
            if key in wanted:
                entries[key] = QueueEntry(state, "" if reason == "None" else reason, nodes)
    return entries


def _accounting(job_ids: list[str]) -> dict[str, QueueEntry]:
    """The same from sacct; empty where there is no accounting."""
    command = ["sacct", "--noheader", "--allocations", "--parsable2", "--format=JobID,State,NodeList"]
    try:
        done = subprocess.run(
            [*command, f"--jobs={','.join(job_ids)}"], capture_output=True, text=True, timeout=_PATIENCE_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    rows = [line.split("|") for line in done.stdout.splitlines() if line.count("|") == 2]
    # "CANCELLED by 1000" -> "CANCELLED"
    return {row[0]: QueueEntry(row[1].split(" ")[0], "", row[2]) for row in rows if row[0] in job_ids}


@dataclass(frozen=True)
class JobFacts:
    """What scontrol says of a job that is there."""

    state: str
    reason: str
    restarts: int  # how often SLURM has started it again


def facts_of(job_id: str) -> JobFacts:
    """State, reason and number of restarts of a job."""
    text = _output("scontrol", "show", "job", "--oneliner", job_id)
    found = dict(re.findall(r"\b(JobState|Reason|Restarts)=(\S+)", text))
    return JobFacts(found.get("JobState", ""), found.get("Reason", ""), int(found.get("Restarts", "0")))


def why_not_requeue(job_id: str, life: int) -> str | None:
    """Why the life-th start of a job must not ask for the next one; None if it may.

    A job that was cancelled must not come back, and after a node failure or a preemption SLURM itself brings it back.
    """
    facts = facts_of(job_id)
    if facts.restarts > life:
        return "SLURM has started the job again already"
    if facts.state == "RUNNING" or facts.reason == "TimeLimit":
        return None
    return f"SLURM ended the job ({facts.state}, {facts.reason}) and decides whether it comes back"


def lost_its_script(job_id: str, life: int) -> bool:
    """Whether the life-th start of a job ends because its batch script was killed (kill -9, out of memory)."""
    facts = facts_of(job_id)
    return facts.restarts <= life and facts.reason.startswith(_SCRIPT_KILLED)


def requeue(job_id: str) -> None:
    """Put a running job back into the queue; SLURM ends its processes."""
    _output("scontrol", "requeue", job_id)


def cancel(job_ids: Iterable[str]) -> None:
    """End jobs for good."""
    wanted = sorted(set(job_ids))
    if wanted:
        _output("scancel", *wanted)


def send_usr2(job_id: str) -> None:
    """Ask a running job to save and end."""
    _output("scancel", "--signal=USR2", job_id)


def partitions(name: str | None = None) -> list[Partition]:
    """The partitions of this cluster (only `name`, or the default one if None), merged over their kinds of nodes."""
    found: dict[str, Partition] = {}
    for line in _nodes().splitlines():
        label, up, limit, nodes, cpus, memory, gres = line.split("|")
        key = label.rstrip("*")
        if (name is None and not label.endswith("*")) or (name is not None and key != name):
            continue
        before = found.get(key)
        gpus = gpus_of(gres)
        for kind, count in (before.gpus if before else {}).items():
            gpus[kind] = max(count, gpus.get(kind, 0))
        found[key] = Partition(
            name=key,
            up=up == "up",
            time_min=minutes(limit),
            nodes=int(nodes) + (before.nodes if before else 0),
            cpus=max(int(cpus.rstrip("+")), before.cpus if before else 0),
            memory_mb=max(int(memory.rstrip("+")), before.memory_mb if before else 0),
            gpus=gpus,
        )
    return list(found.values())


@functools.cache
def _nodes() -> str:
    """A line for each partition and kind of node."""
    return _output("sinfo", "--noheader", "--format=%P|%a|%l|%D|%c|%m|%G")


def names_of_partitions() -> list[str]:
    return sorted({line.strip() for line in _output("sinfo", "--noheader", "--format=%R").splitlines()})


def gpus_of(gres: str) -> dict[str, int]:
    """GPUs in a GRES string, by type: "gpu:a100:4(S:0-1),gpu:2" -> {"a100": 4, "": 2}."""
    found: dict[str, int] = {}
    for kind, count in re.findall(r"\bgpu:(?:([A-Za-z][\w.-]*):)?(\d+)", gres):
        found[kind] = found.get(kind, 0) + int(count)
    return found


def minutes(limit: str) -> int | None:
    """SLURM's time limit in whole minutes: "infinite" -> None, "1-00:00:00" -> 1440, "30:00" -> 30."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", limit.strip())
    if match is None:
        return None
    days, hours, mins, _ = (int(part or 0) for part in match.groups())
    return days * 1440 + hours * 60 + mins
