"""The supervisor of a job on this machine: what SLURM is on a cluster.

Owns: starting the ranks, ending all when one breaks, starting them again from what lies on disk, bounded. One process
for each submission, in a session of its own, so that the launcher may end (--detach) and Ctrl-C does not reach it:

    SIGTERM, SIGINT, SIGUSR2 once   the ranks are told to save and end
    a second time                   the ranks are killed
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from functools import partial
from types import FrameType

from submitit.core.utils import JobPaths
from submitit.local.local import Controller

from cluster.process import kill_group
from cluster.restarts import PREEMPTED, Verdict, decide, patiently, say, stuck
from cluster.state import WAITING, state_of
from cluster.submission import Record, Submission
from configs.errors import run

_POLL_S = 0.1
# The others of a broken rank get so long to fail by themselves, for the sake of their logs, then they are killed.
_PEERS_S = 3.0
# After the first rank is done, the others may take so long to end.
_LEAVING_S = 300.0
_LONGEST_PAUSE_S = 60.0


class Supervisor(Controller):
    """submitit's controller of local tasks, with process groups, restarts and dependencies."""

    def __init__(self, submission: Submission, record: Record) -> None:
        os.environ |= {
            "SUBMITIT_LOCAL_TIMEOUT_S": "0",
            "SUBMITIT_LOCAL_SIGNAL_DELAY_S": "0",
            "SUBMITIT_STDERR_TO_STDOUT": "1",
            "SUBMITIT_LOCAL_WITH_SHELL": "",
            "AKORN_SUPERVISOR": str(os.getpid()),
        }
        super().__init__(submission.submitit_folder)
        self.submission = submission
        self.record = record
        self.stop_requests = 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, self._on_stop)

    def _on_stop(self, signum: int, frame: FrameType | None) -> None:
        self.stop_requests += 1
        self._pass_on()

    def _pass_on(self) -> None:
        """Tell the ranks that they are asked to end."""
        at_once = self.stop_requests > 1 or self.submission.link != "pretrain"  # an evaluation keeps the parts it has
        for task in self.tasks:
            if at_once:
                kill_group(task.pid)
            elif task.poll() is None:
                task.send_signal(signal.SIGUSR2)

    def start_tasks(self) -> None:
        """Start all ranks, each in a process group of its own."""
        paths = [JobPaths(self.folder, self.pid, rank) for rank in range(self.ntasks)]
        self.stdouts = [path.stdout.open("a") for path in paths]
        for rank, log in enumerate(self.stdouts):
            place = {
                "SUBMITIT_LOCAL_LOCALID": str(rank),
                "SUBMITIT_LOCAL_GLOBALID": str(rank),
                "SUBMITIT_LOCAL_JOB_ID": self.pid,
            }
            self.tasks.append(
                subprocess.Popen(
                    self.command, env={**os.environ, **place}, stdout=log, stderr=log, start_new_session=True
                )
            )

    def kill_tasks(self) -> None:
        """End every process of this life, loader workers included."""
        for task in self.tasks:
            kill_group(task.pid)
            task.wait()
        self.tasks = []
        for log in self.stdouts:
            log.close()
        self.stdouts = []

    def live(self) -> list[int | None]:
        """One life: start the ranks and wait until all have ended, or the patience with the others of a broken one has.
        Returns their exit codes; None for those that still run."""
        self.start_tasks()
        if self.stop_requests:  # in the meantime, so that not all of them were told
            self._pass_on()
        deadline = float("inf")
        codes = [task.poll() for task in self.tasks]
        while None in codes and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            codes = [task.poll() for task in self.tasks]
            ended = [code for code in codes if code is not None]
            if ended:
                patience = _LEAVING_S if set(ended) <= {0, PREEMPTED} else _PEERS_S
                deadline = min(deadline, time.monotonic() + patience)
        return codes

    def supervise(self) -> None:
        """All lives, until the job is done, given up or stopped."""
        if not self._wait_for_others():
            return
        life = len(self.submission.lives())
        while not self.stop_requests:
            os.environ["AKORN_LIFE"] = str(life)
            try:
                codes = self.live()
            finally:
                self.kill_tasks()
            if self.stop_requests:
                break
            verdict = patiently(partial(self._judge, life, codes), stopped=lambda: self.stop_requests > 0)
            say(f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {verdict.action}: {verdict.reason}")
            if self._is_over(verdict):
                return
            self._pause()
            life += 1
        self._declare_stopped()

    def _judge(self, life: int, codes: Sequence[int | None]) -> Verdict:
        return decide(
            self.submission,
            self.submission.generation(life),
            describe(codes),
            preempted=PREEMPTED in codes and all(code in (0, PREEMPTED) for code in codes),
            max_restarts=self.record.max_restarts,
        )

    def _is_over(self, verdict: Verdict) -> bool:
        if verdict.action == "failed":
            self.submission.write_outcome("failed", verdict.reason)
        elif verdict.reason == "cancelled":
            self.submission.write_outcome("cancelled", "by request")
        return verdict.action != "restart"

    def _declare_stopped(self) -> None:
        cancelled = self.submission.cancel_file.exists()
        self.submission.write_outcome("cancelled" if cancelled else "stopped", "by request")

    def _pause(self) -> None:
        """Wait before a restart, longer each time that nothing was gained."""
        seconds = min(_LONGEST_PAUSE_S, 2.0 ** min(stuck(self.submission.failures()) - 1, 10))
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.stop_requests:
            time.sleep(_POLL_S)

    def _wait_for_others(self) -> bool:
        """Wait for the submissions this one depends on; False if it need not run any more."""
        for name in self.record.after:
            other = Submission(self.submission.folder.with_name(name))
            while not self.stop_requests and state_of(other).name in WAITING:
                time.sleep(5 * _POLL_S)
            outcome = other.outcome()
            if other.link == "pretrain" and not self.stop_requests and (not outcome or outcome.status != "finished"):
                self.submission.write_outcome("cancelled", f"{other.link} did not finish")
                return False
        if self.stop_requests:
            self._declare_stopped()
        return not self.stop_requests


def describe(codes: Sequence[int | None]) -> str:
    """Exit codes of the ranks in words; of several broken ranks, the one that was killed is named first."""
    broken = [(code, rank) for rank, code in enumerate(codes) if code is not None and code not in (0, PREEMPTED)]
    words = [
        f"rank {rank} was killed by {signal.Signals(-code).name}" if code < 0 else f"rank {rank} failed ({code})"
        for code, rank in sorted(broken)
    ]
    return ", ".join(words[:4]) or "the ranks ended without a result"


def _await_record(submission: Submission) -> Record:
    """The launcher writes the record right after it has started this process."""
    end = time.monotonic() + 60
    while (record := submission.record()) is None:
        if time.monotonic() > end:
            raise TimeoutError(f"{submission.folder}: the launcher ended before the submission was complete")
        time.sleep(_POLL_S)
    return record


def main() -> int:
    submission = Submission(Path(sys.argv[1]))
    Supervisor(submission, _await_record(submission)).supervise()
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
