"""What runs on a node: one rank of a job, from submitit's first call to the exit code.

Owns: the rank's place and environment, its log, the signal that asks it to end, and what its end means for the job.
`Job` is pickled by the launcher and called on every rank, in every life of the job. It holds nothing but where its
submission lies: what a life goes on from is decided by what lies in the run's folder.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from cluster import environment, slurm
from cluster.process import end_with_parent
from cluster.restarts import PREEMPTED, stand_in
from cluster.submission import Submission
from configs import PretrainConfig, UserError, load

_STOP = "AKORN_STOP_REQUESTED"
_REQUEUE_PATIENCE_S = 120


@dataclass(frozen=True)
class Place:
    """Where this process stands in its job."""

    rank: int
    local_rank: int
    world_size: int
    processes: int  # on this node
    cores: int | None  # that SLURM gives each process of its own; None: the node's processes share what they see
    address: str  # host of rank 0
    job_number: int
    life: int
    requeue_id: str | None  # what SLURM calls this job; None on this machine


def place() -> Place:
    """Read the place of this process from submitit's environment."""
    from submitit import JobEnvironment

    here = JobEnvironment()
    local = here.cluster == "local"
    return Place(
        rank=here.global_rank,
        local_rank=here.local_rank,
        world_size=here.num_tasks,
        processes=here.num_tasks // here.num_nodes,
        cores=None if local else int(os.environ.get("SLURM_CPUS_PER_TASK", "0")) or None,
        address="127.0.0.1" if local else here.hostnames[0],
        job_number=int(here.raw_job_id),
        life=int(os.environ.get("AKORN_LIFE" if local else "SLURM_RESTART_COUNT", "0")),
        requeue_id=None if local else here.job_id,
    )


@dataclass(frozen=True)
class Job:
    """One link of a run: a pretraining, an evaluation, or the report.

    Args:
        submission: its folder.
        entry: "module:function" that does the work; see `work`.
    """

    submission: str
    entry: str

    def __call__(self) -> str:
        """Run this rank. Returns what it came to; leaves by SystemExit where the exit code matters."""
        submission = Submission(Path(self.submission))
        outcome = submission.outcome()
        if outcome is not None:  # SLURM started a job again that was over, after a node had failed at its end
            return outcome.status
        here = place()
        generation = submission.generation(here.life)
        if here.requeue_id is None:
            end_with_parent(int(os.environ["AKORN_SUPERVISOR"]))
        _clear_leftovers(here)
        _open_log(submission, here, generation)
        signal.signal(signal.SIGUSR2, _remember_stop)
        if here.rank == 0 and here.requeue_id is not None:
            signal.signal(signal.SIGTERM, lambda *_: stand_in(submission, here.life))
        if here.rank == 0:
            submission.add_life(generation, host=socket.gethostname(), world_size=here.world_size)
        return self._end(submission, here, self._run(submission, here, generation))

    def _run(self, submission: Submission, here: Place, generation: int) -> str:
        """Do the work; a user's mistake ends the job for good, since a restart would meet it again."""
        try:
            config = load(_config_file(submission))
            port = environment.port_at(config.cluster, here.job_number, generation)
            os.environ.update(
                environment.of_rank(
                    rank=here.rank,
                    local_rank=here.local_rank,
                    world_size=here.world_size,
                    processes=here.processes,
                    cores=here.cores,
                    address=here.address,
                    port=port,
                    generation=generation,
                )
            )
            return work(self.entry, config, submission)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            if not submission.is_replaced(generation):
                submission.write_outcome("failed", str(error))
            raise SystemExit(2) from None
        except RuntimeError as error:
            if type(error).__name__ != "Fenced":
                raise
            print(f"this life of the job ends: {error}", file=sys.stderr, flush=True)
            raise SystemExit(0) from None

    def _end(self, submission: Submission, here: Place, status: str) -> str:
        """Rank 0 declares the end, or asks for the next life; the others just leave."""
        sys.stdout.flush()
        if here.rank != 0:
            return status
        if status != "preempted":
            submission.write_outcome("finished")
            return status
        if here.requeue_id is not None and not submission.cancel_file.exists():
            _requeue(here.requeue_id, here.life)
        raise SystemExit(PREEMPTED)


def work(entry: str, config: Any, submission: Submission) -> str:
    """Call what does the work, with what it takes. Returns "finished" or "preempted".

    A pretraining gets its observers and the run's folder, an evaluation its output folder, any other entry (the
    report) the run's folder.
    """
    module, _, name = entry.partition(":")
    function = getattr(imported(module), name)
    if isinstance(config, PretrainConfig) and submission.link == "pretrain":
        return str(function(config, observers=observers_of(config), run_dir=submission.home).status)
    if submission.link == "report":
        function(submission.home)
    else:
        function(config, out_dir=Path(config.out))
    return "finished"


def observers_of(config: PretrainConfig) -> Sequence[Any]:
    """The evaluations that a training makes on its way, if it asks for any."""
    if config.observers.knn_every is None and config.observers.objects_every is None:
        return ()
    observers: Sequence[Any] = imported("downstream.online").make_observers(config)
    return observers


def imported(name: str) -> ModuleType:
    """Import a module with all that it needs, without looking for garbage: hundreds of thousands of objects come to
    stay, and looking through them again and again takes a tenth of the time. Nor are they looked through later."""
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def _config_file(submission: Submission) -> Path:
    own = submission.folder / "config.yaml"
    return own if submission.link != "pretrain" and own.is_file() else submission.home / "config.yaml"


def _remember_stop(signum: int, frame: FrameType | None) -> None:
    """Note that this process shall end, until the training listens itself. In place of submitit's handler, which would
    requeue and exit on rank 0 at once, so that nothing agreed by all ranks could follow."""
    os.environ[_STOP] = "1"


def _clear_leftovers(here: Place) -> None:
    """Remove the result that a life killed while writing it left half done; submitit would refuse to start."""
    from submitit.core.utils import JobPaths

    result = JobPaths(os.environ["SUBMITIT_FOLDER"], here.requeue_id or str(here.job_number), here.rank).result_pickle
    result.with_name(result.name + ".save_tmp").unlink(missing_ok=True)


def _open_log(submission: Submission, here: Place, generation: int) -> None:
    """Send stdout and stderr to HOME/logs/LINK.rankR.log, appending; LINK.log shows rank 0's."""
    folder = submission.home / "logs"
    folder.mkdir(exist_ok=True)
    path = folder / f"{submission.link}.rank{here.rank}.log"
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    name = f"job {here.requeue_id}" if here.requeue_id else f"process {os.getpid()}"
    print(f"--- {now} generation {generation}: {name} on {socket.gethostname()}", flush=True)
    link = folder / f"{submission.link}.log"
    if here.rank == 0 and not link.is_symlink():
        link.symlink_to(path.name)


def _requeue(job_id: str, life: int) -> None:
    """Ask SLURM for the next life, and wait for the end that comes with it.

    Where that fails (no SLURM commands inside a container), the batch script's last lines do it.
    """
    try:
        objection = slurm.why_not_requeue(job_id, life)
        if objection is not None:
            print(f"no requeue: {objection}", file=sys.stderr, flush=True)
            return
        slurm.requeue(job_id)
    except UserError as error:
        print(f"requeue from the batch script instead: {error}", file=sys.stderr, flush=True)
        return
    time.sleep(_REQUEUE_PATIENCE_S)
