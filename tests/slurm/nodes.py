"""A real SLURM of three nodes on this machine, for tests: started by up.sh, with faults on demand.

Owns: where it lies, starting and stopping it, and finding the processes of a job's ranks.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from cluster.tail import last_lines

SCRIPTS = Path(__file__).parent
ROOT = Path(os.environ.get("SLURM_TEST_ROOT", "/tmp/akorn-slurm"))
# Held by the one test run that has the cluster; its ports and interfaces are the machine's, wherever its root lies.
LOCK = Path("/tmp/akorn-slurm.lock")
NODES = ("n1", "n2", "n3")


def why_not() -> str | None:
    """Why no SLURM can be started here, or None if it can."""
    if os.geteuid() != 0:
        return "a SLURM of several nodes needs root (network and process namespaces)"
    if not Path("/usr/bin/dpkg-query").exists():
        return "a SLURM of several nodes needs Debian's packages"
    return None


@contextlib.contextmanager
def reserved() -> Iterator[bool]:
    """Whether this test run is the only one here that uses the cluster; if so, it stays that as long as this lasts."""
    with LOCK.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def start() -> str | None:
    """Start the cluster afresh, whatever an earlier run has left. Returns why it could not be started."""
    stop()
    try:
        done = _script("up.sh", seconds=400)
    except subprocess.TimeoutExpired:
        return "SLURM did not start in time"
    return None if done.returncode == 0 else f"SLURM did not start: {done.stderr.strip()[-500:]}"


def stop() -> None:
    _script("down.sh", seconds=120)


def fault(command: str, node: str) -> None:
    """crash, kill-slurmd, unplug, plug or start a node."""
    done = _script("up.sh", command, node.removeprefix("n"), seconds=120)
    assert done.returncode == 0, done.stderr


def start_all() -> None:
    """Bring back all nodes that are gone."""
    for node in NODES:
        fault("start", node)


def heal() -> None:
    """Bring back all nodes, and end what still runs on them."""
    start_all()
    command("scancel", "--user=root")


def controller(command: str) -> None:
    """kill or start slurmctld."""
    assert _script("up.sh", f"{command}-controller", seconds=120).returncode == 0


def _script(name: str, *arguments: str, seconds: float) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "SLURM_TEST_ROOT": str(ROOT)}
    command = ["bash", str(SCRIPTS / name), *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=seconds)


def environment() -> dict[str, str]:
    """The variables by which SLURM's commands find this cluster."""
    return {"SLURM_CONF": str(ROOT / "etc" / "slurm.conf")}


def command(*arguments: str) -> str:
    """Output of a SLURM command."""
    variables = {**os.environ, **environment()}
    done = subprocess.run(arguments, env=variables, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.strip()


def scene() -> str:
    """What SLURM says of jobs and nodes, for the message of a test that waited in vain."""
    said = [f"{ROOT}: the end of slurmctld.log:", *last_lines(ROOT / "log" / "slurmctld.log", 15)]
    for question in (["squeue", "--long"], ["sinfo", "--Node", "--long"]):
        try:
            said.append(command(*question))
        except subprocess.SubprocessError as error:
            said.append(str(error))
    return "\n".join(said)


def nodes_of(job_id: str) -> list[str]:
    """Nodes on which a job runs now, its first (with the batch script and rank 0) first."""
    names = command("scontrol", "show", "hostnames", command("squeue", "-h", "-j", job_id, "-o", "%N"))
    return names.split()


def minutes_run(job_id: str) -> int:
    """Whole minutes that a job has run in its present life."""
    hours, minutes, _ = command("scontrol", "show", "job", job_id).split("RunTime=")[1].split()[0].split(":")
    return int(hours) * 60 + int(minutes)


def ranks(job_id: str, life: int | None = None) -> Iterator[tuple[int, int]]:
    """Process id and rank of each process of a job that is a rank (not srun, not a loader worker).

    Args:
        life: only those of the life-th start of the job, from 0.
    """
    for pid, arguments, variables in _processes(job_id):
        started = int(variables.get(b"SLURM_RESTART_COUNT", b"0"))
        is_rank = b"submitit.core._submit" in arguments and b"python" in arguments[0] and b"SLURM_PROCID" in variables
        if is_rank and life in (None, started):
            yield pid, int(variables[b"SLURM_PROCID"])


def _processes(job_id: str) -> Iterator[tuple[int, list[bytes], dict[bytes, bytes]]]:
    """Process id, arguments and environment of every process of a job."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
            variables = dict(
                item.split(b"=", 1) for item in (folder / "environ").read_bytes().split(b"\0") if b"=" in item
            )
        except OSError:
            continue
        if variables.get(b"SLURM_JOB_ID") == job_id.encode():
            yield int(folder.name), arguments, variables


def kill_rank(job_id: str, rank: int, life: int | None = None) -> None:
    """kill -9 of one rank."""
    (pid,) = (pid for pid, number in ranks(job_id, life) if number == rank)
    os.kill(pid, signal.SIGKILL)


def kill_script(job_id: str) -> None:
    """kill -9 of a job's batch script."""
    (pid,) = (pid for pid, arguments, _ in _processes(job_id) if b"/slurm_script" in b"".join(arguments))
    os.kill(pid, signal.SIGKILL)


def send(pids: Iterable[int], number: signal.Signals) -> list[int]:
    """Send a signal to those of the processes that are there, and return them."""
    there = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            there.append(pid)
    return there


def has_heard(pid: int, number: signal.Signals) -> bool:
    """Whether a signal has come for a stopped process: it is pending, or SLURM has woken the process for it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True
    is_pending = bool(int(status.split("ShdPnd:")[1].split()[0], 16) >> (number - 1) & 1)
    return is_pending or "State:\tT" not in status


def wait_for(what: str, condition: Callable[[], bool], seconds: float) -> None:
    """Wait until a condition holds; fails with `what` and the state of the cluster after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}\n{scene()}")
        time.sleep(0.2)
