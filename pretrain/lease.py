"""Who owns a run: only its newest life may write; an older one that still runs notices within seconds and ends.

Owns: `owner.json` in the run's folder: generation, host, process, start. A life with a higher generation replaces it
by rename. The owner touches the file every few seconds, which a stale owner does harmlessly to its successor's file.
Every rank watches the file in a thread, so that a rank stuck in a collective with dead peers ends as well; one of each
node often, the others rarely: a thousand would ask the file system five hundred times a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from configs.errors import UserError

BEAT_S = 2.0  # seconds between looks at the file
RARE_S = 30.0  # between those of a rank that is not the first on its node: it writes nothing that matters
STALE_S = 30.0  # without a touch for this long, the owner counts as dead
GRACE_S = 30.0  # a fenced process that reaches no step boundary within this time is ended where it stands
EXIT_FENCED = 0  # of a process ended so: nothing failed, and nothing is to be restarted


class Fenced(RuntimeError):  # noqa: N818  (the name that the launcher waits for)
    """A younger life of the run has taken over; this one must write nothing more."""


@dataclass(frozen=True)
class Owner:
    """What `owner.json` says."""

    generation: int
    host: str
    pid: int
    started: float  # seconds since 1970


def read_owner(run_dir: Path) -> Owner | None:
    """The owner on record, dead or alive; None where there is none."""
    try:
        return Owner(**json.loads((run_dir / "owner.json").read_text()))
    except FileNotFoundError:
        return None


def living_owner(run_dir: Path) -> Owner | None:
    """The owner, if it gave a sign of life lately and, on this host, its process exists."""
    owner = read_owner(run_dir)
    if owner is None or owner.pid == 0:
        return None
    try:
        age = time.time() - (run_dir / "owner.json").stat().st_mtime
    except FileNotFoundError:
        return None
    here = owner.host == socket.gethostname()
    return owner if age < STALE_S and (not here or _exists(owner.pid)) else None


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class Lease:
    """This life's claim on a run. Rank 0 calls `take`; the other ranks only watch."""

    def __init__(self, run_dir: Path, generation: int) -> None:
        self.generation = generation
        self._file = run_dir / "owner.json"
        self._owns = False
        self._often = True
        self._lost = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lease", daemon=True)

    def take(self) -> None:
        """Put this life down as the owner (rank 0).

        Raises:
            Fenced: a younger life was faster.
        """
        self.check()
        owner = Owner(self.generation, socket.gethostname(), os.getpid(), time.time())
        self._write(owner)
        self._owns = True
        self.check()

    def watch(self, *, often: bool = True) -> None:
        """Start looking after the file, on every rank; `often` on the owner at least."""
        self._often = often
        self._thread.start()

    def check(self) -> None:
        """Raise `Fenced` where a younger life owns the run: before each write that matters; reads one small file."""
        with contextlib.suppress(OSError, ValueError):
            owner = Owner(**json.loads(self._file.read_text()))
            if owner.generation > self.generation:
                self._lost.set()
        if self._lost.is_set():
            raise Fenced(f"life {self.generation} of this run has been replaced by a younger one; it ends")

    @property
    def lost(self) -> bool:
        """True once the watching thread has seen a younger owner; costs nothing."""
        return self._lost.is_set()

    def close(self) -> None:
        """Stop watching; the owner puts itself down as gone."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._owns and not self._lost.is_set():
            with contextlib.suppress(Fenced, OSError):
                self.check()
                self._write(Owner(self.generation, socket.gethostname(), 0, time.time()))

    def _write(self, owner: Owner) -> None:
        partial = self._file.with_name(f".owner.{os.getpid()}.json")
        partial.write_text(json.dumps(asdict(owner)))
        partial.rename(self._file)

    def _watch(self) -> None:
        while not self._closed.wait(BEAT_S if self._often else RARE_S):
            try:
                self.check()
                if self._owns:
                    os.utime(self._file)
            except Fenced as fenced:
                if not self._closed.wait(GRACE_S):
                    print(f"{fenced} (stuck for {GRACE_S:.0f} s since)", file=sys.stderr, flush=True)
                    os._exit(EXIT_FENCED)
                return
            except OSError:  # the file system is away for a moment
                continue


def next_generation(run_dir: Path) -> int:
    """The generation of a life started now: as the launcher says (AKORN_GENERATION), or one more than the last.

    Raises:
        UserError: started by hand while another life is running.
    """
    given = os.environ.get("AKORN_GENERATION")
    if given is not None:
        return int(given)
    owner = living_owner(run_dir)
    if owner is not None:
        raise UserError(
            f"{run_dir} is running already, on {owner.host} as process {owner.pid}; "
            "stop that one first, or give this run another name"
        )
    last = read_owner(run_dir)
    return 1 if last is None else last.generation + 1
