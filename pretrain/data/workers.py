"""Loader processes: they fill rows of batches in shared memory, and cannot hang the run.

Owns: starting the processes, dealing them rows, waiting for rows with a time-out, and telling what went wrong. Each
worker has a pipe of its own, so that one killed at any moment leaves no lock behind; its death is seen at once as the
end of its pipe, and its parent's death ends it. Messages are a few numbers: what is to be read stands in the shared
memory, and so do the results. The processes come from multiprocessing's fork server, which imports torch once for
all of them and has neither threads nor devices. They run at lower priority, single-threaded, and leave signals to the
trainer.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from pretrain.data.fetch import Fetcher, place_of
from pretrain.data.ledger import Skipped
from pretrain.data.memory import Layout, Memory, size_of

PRELOADED = ["pretrain.data.workers", "pretrain.data.keep"]
NICENESS = 5
GRACE_S = 1.0

# Signals that SLURM and users send to every process of a job: the trainer acts on them, workers go on until it ends.
LEFT_TO_TRAINER = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}


class LoaderError(RuntimeError):
    """Data can no longer be read; the message says why, and where."""


@dataclass(frozen=True)
class Job:
    """What a worker gets when it starts. `memory` holds the slots, then one int64 per worker: the sample in hand."""

    worker: int
    fetcher: Fetcher
    memory: Memory
    layout: Layout
    slots: int
    workers: int

    def slot(self, number: int) -> dict[str, np.ndarray]:
        """Arrays of a slot: epochs and samples int64 [b], and the transform's arrays [b, ...]."""
        return self.memory.arrays(self.layout, number * size_of(self.layout))

    def in_hand(self) -> np.ndarray:
        """int64 [workers]: the sample that each worker is at, -1 for none."""
        layout: Layout = {"in_hand": ((self.workers,), np.dtype(np.int64))}
        return self.memory.arrays(layout, self.slots * size_of(self.layout))["in_hand"]


def serve(job: Job, pipe: connection.Connection) -> None:
    """A worker's life: fill rows until the pipe ends."""
    signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_TO_TRAINER)
    import torch

    torch.set_num_threads(1)
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    slots = [job.slot(number) for number in range(job.slots)]
    in_hand = job.in_hand()
    with contextlib.suppress(EOFError, OSError):  # the trainer is gone
        while True:
            number, first, last = pipe.recv()
            try:
                skipped = fill(job.fetcher, slots[number], range(first, last), in_hand[job.worker : job.worker + 1])
            except Exception as error:
                pipe.send((number, error if isinstance(error, UserError) else None, traceback.format_exc()))
                return
            pipe.send((number, skipped, (job.fetcher.read_s, job.fetcher.transform_s)))


def fill(
    fetcher: Fetcher, slot: dict[str, np.ndarray], rows: range, in_hand: np.ndarray | None = None
) -> list[Skipped]:
    """Fetch the samples planned for these rows of a slot; `samples` then says which were used."""
    skipped: list[Skipped] = []
    fetched = fetcher.fetch(slot["epochs"][rows.start : rows.stop], slot["samples"][rows.start : rows.stop], in_hand)
    for row, (used, arrays, broken) in zip(rows, fetched):
        if broken:
            slot["samples"][row] = used
        for name, array in arrays.items():
            slot[name][row] = array
        skipped += broken
    if in_hand is not None:
        in_hand[0] = -1
    return skipped


class Pool:
    """Workers and the slots that they fill.

    Args:
        fetcher: what they do with a sample.
        layout: of a slot, see `Job.slot`.
        slots: batches in shared memory.
        timeout_s: seconds without any news from the workers after which `wait` raises.
    """

    def __init__(self, fetcher: Fetcher, layout: Layout, *, workers: int, slots: int, timeout_s: float) -> None:
        self.rows = layout["samples"][0][0]
        self.timeout_s = timeout_s
        self.memory = Memory(slots * size_of(layout) + 8 * workers)
        self._job = Job(0, fetcher, self.memory, layout, slots, workers)
        self.slots = [self._job.slot(number) for number in range(slots)]
        self.stage_s = np.zeros((workers, 2))
        self._pipes: list[connection.Connection] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._waiting: dict[int, int] = {}  # slot -> parts that are still out
        self._skipped: dict[int, list[Skipped]] = {}
        self._turn = 0
        self.close = Finalize(self, _end, (self._pipes, self._processes), exitpriority=100)
        context = fork_server()
        for worker in range(workers):
            ours, theirs = context.Pipe()
            job = Job(worker, fetcher, self.memory, layout, slots, workers)
            process = context.Process(target=serve, args=(job, theirs), daemon=True, name=f"loader {worker}")
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def submit(self, number: int) -> None:
        """Have a slot filled, whose epochs and samples are set: a part by each worker."""
        workers = min(len(self._pipes), self.rows)
        bounds = [self.rows * part // workers for part in range(workers + 1)]
        self._waiting[number], self._skipped[number] = workers, []
        for part in range(workers):
            worker = (part + self._turn) % len(self._pipes)
            try:
                self._pipes[worker].send((number, bounds[part], bounds[part + 1]))
            except OSError as error:
                raise self._died(worker) from error
        self._turn += workers

    def wait(self, number: int) -> list[Skipped]:
        """Block until a slot is filled; the broken samples met on the way.

        Raises:
            LoaderError: a worker died or failed, or nothing happened for `timeout_s`.
            UserError: what a worker raised.
        """
        deadline = time.monotonic() + self.timeout_s
        while self._waiting[number]:
            if self._listen(deadline - time.monotonic()):
                deadline = time.monotonic() + self.timeout_s
            elif time.monotonic() >= deadline:
                raise self._stalled()
        return self._skipped.pop(number)

    def _listen(self, timeout_s: float) -> bool:
        """Take in one message of each worker that has one; False if none came in time."""
        spoken = connection.wait(self._pipes, max(0.0, timeout_s))
        for pipe in spoken:
            worker = self._pipes.index(pipe)  # type: ignore[arg-type]
            try:
                number, result, detail = self._pipes[worker].recv()
            except (EOFError, OSError) as error:
                raise self._died(worker) from error
            if not isinstance(result, list):
                raise result or LoaderError(f"loader worker {worker} failed at {self._place(worker)}:\n{detail}")
            self._waiting[number] -= 1
            self._skipped[number] += result
            self.stage_s[worker] = detail
        return bool(spoken)

    def _place(self, worker: int) -> str:
        """What a worker is at, in words."""
        sample = int(self._job.in_hand()[worker])
        if sample < 0:
            return "no sample in hand"
        shard, key = place_of(self._job.fetcher.reader.index, sample)
        return f"shard {shard}, key {key}"

    def _died(self, worker: int) -> LoaderError:
        process = self._processes[worker]
        process.join(GRACE_S)
        code = process.exitcode
        reason = f"exit code {code}"
        if code is not None and code < 0:
            reason = f"killed by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -9 else "")
        return LoaderError(
            f"loader worker {worker} (process {process.pid}) died: {reason}; it was at {self._place(worker)}"
        )

    def _stalled(self) -> LoaderError:
        places = [f"worker {w} (process {p.pid}) at {self._place(w)}" for w, p in enumerate(self._processes)]
        busy = [place for place in places if "no sample" not in place] or places
        return LoaderError(
            f"no data for {self.timeout_s:.0f} s; {'; '.join(busy)}. Is the storage there? "
            "loading.timeout_s sets how long to wait"
        )


def _end(pipes: list[connection.Connection], processes: list[Any]) -> None:
    """Ends of the pipes end the workers; one that is stuck in a read is killed."""
    for pipe in pipes:
        pipe.close()
    deadline = time.monotonic() + GRACE_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def fork_server() -> Any:
    """The fork server's context; the server is started with what all workers share, if it does not run yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with _server_environment(), _signals_blocked():
        forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _server_environment() -> Iterator[None]:
    """The environment in which numeric libraries start no threads of their own, and in which PRELOADED is found."""
    paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    wanted = {**single, "PYTHONPATH": os.pathsep.join(paths)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes started inside never get the signals that are the trainer's; it gets its own afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_TO_TRAINER)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
