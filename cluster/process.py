"""Processes of this machine: alive or not, told apart from later ones with the same number.

Owns: what is read from /proc, and that ranks end with the process that started them. On systems without /proc, a
process counts as alive if a signal can be sent to it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h


def started_at(pid: int) -> float | None:
    """When a process started, in clock ticks since boot; None if there is none or it has ended (a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None if sys.platform == "linux" or not _signallable(pid) else 0.0
    return None if fields[0] == "Z" else float(fields[19])


def alive(pid: int, started: float) -> bool:
    """Whether the process that started then is still there, and not another one with its number."""
    return started_at(pid) == started


def _signallable(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def end_with_parent(parent: int) -> None:
    """Have the system kill this process when its parent ends (Linux only), or now if `parent` is gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_group(leader: int) -> None:
    """Kill a process group (a rank with its loader workers), if there is anything left of it."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
