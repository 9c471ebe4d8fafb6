"""A real SLURM of three nodes on this machine, for tests: started by up.sh, with faults on demand.

Owns: where it lies, starting and stopping it, and finding the processes of a job's ranks.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

SCRIPTS = Path(__file__).parent
ROOT = Path(os.environ.get("SLURM_TEST_ROOT", "/tmp/akorn-slurm"))
NODES = ("n1", "n2", "n3")


def why_not() -> str | None:
    """Why no SLURM can be started here, or None if it can."""
    if os.geteuid() != 0:
        return "a SLURM of several nodes needs root (network and process namespaces)"
    if not Path("/usr/bin/dpkg-query").exists():
        return "a SLURM of several nodes needs Debian's packages"
    return None


def is_up() -> bool:
    """Whether the cluster runs already (started by hand, and left running)."""
    pid_file = ROOT / "run" / "slurmctld.host.pid"
    return pid_file.exists() and Path(f"/proc/{pid_file.read_text().strip()}").exists()


def start() -> str | None:
    """Start the cluster, or find it healthy. Returns why it could not be started."""
    try:
        done = subprocess.run(
            ["bash", str(SCRIPTS / "up.sh")], env=_own_environment(), capture_output=True, text=True, timeout=300
        )
    except subprocess.TimeoutExpired:
        return "SLURM did not start within 5 minutes (installing its packages takes one)"
    return None if done.returncode == 0 else f"SLURM did not start: {done.stderr.strip()[-500:]}"


def stop() -> None:
    subprocess.run(["bash", str(SCRIPTS / "down.sh")], env=_own_environment(), check=False, timeout=60)


def fault(command: str, node: str) -> None:
    """crash, kill-slurmd, unplug, plug or start a node."""
    subprocess.run(
        ["bash", str(SCRIPTS / "up.sh"), command, node.removeprefix("n")],
        env=_own_environment(),
        check=True,
        timeout=90,
    )


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
    subprocess.run(
        ["bash", str(SCRIPTS / "up.sh"), f"{command}-controller"], env=_own_environment(), check=True, timeout=90
    )


def _own_environment() -> dict[str, str]:
    return {**os.environ, "SLURM_TEST_ROOT": str(ROOT)}


def environment() -> dict[str, str]:
    """The variables by which SLURM's commands find this cluster."""
    return {"SLURM_CONF": str(ROOT / "etc" / "slurm.conf")}


def command(*arguments: str) -> str:
    """Output of a SLURM command."""
    done = subprocess.run(arguments, env={**os.environ, **environment()}, capture_output=True, text=True, check=True)
    return done.stdout.strip()


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


def is_pending(pid: int, number: signal.Signals) -> bool:
    """Whether a signal waits for a process that is stopped."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.split("ShdPnd:")[1].split()[0], 16) >> (number - 1) & 1)


def wait_for(what: str, condition: Callable[[], bool], seconds: float) -> None:
    """Wait until a condition holds; fails with `what` after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.2)
