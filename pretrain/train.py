"""Training: from a configuration to a finished run.

Owns: one life of a run on one rank, the loop, and what is done when a step says that something is wrong. What a step
is lies in microbatch.py, what a checkpoint is in checkpoint.py; here is only the order of things.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configs.schema import PretrainConfig
from pretrain import distributed, saver
from pretrain.distributed import Ranks
from pretrain.lease import Lease, next_generation
from pretrain.microbatch import backward
from pretrain.monitor import Reading
from pretrain.observing import GRACE_S, Observer
from pretrain.preemption import Stop
from pretrain.schedule import due
from pretrain.session import Session, open_session
from pretrain.sickness import Rollback, judge


@dataclass(frozen=True)
class Outcome:
    """How a life of a run ended."""

    status: Literal["finished", "preempted"]
    step: int  # complete steps


def run(config: PretrainConfig, *, observers: Sequence[Observer] = (), run_dir: Path) -> Outcome:
    """Train until the run is finished or asked to stop; called on every rank (collective).

    Resumes from what lies in `run_dir`. A finished run has its export in `run_dir/export`.

    Raises:
        UserError: the configuration, the data or the numerics (`Diverged`) leave no way on; a restart would not help.
        pretrain.lease.Fenced: a younger life of the run has taken over.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    ranks = distributed.join()
    distributed.check_divides(config.batch_size, ranks.world_size)
    generation = distributed.broadcast_json(next_generation(run_dir) if ranks.first else None, ranks)
    with contextlib.ExitStack() as stack:
        lease = Lease(run_dir, generation)
        stack.callback(lease.close)
        if ranks.first:
            lease.take()
        distributed.barrier(ranks)
        lease.watch(often=ranks.local_rank == 0)
        stop = stack.enter_context(Stop(ranks))
        try:
            return _live(config, observers, run_dir, ranks, lease, stop)
        except RuntimeError:
            lease.check()  # peers that were fenced off are gone: then so is this rank, and not by a defect
            raise


def _live(
    config: PretrainConfig, observers: Sequence[Observer], run_dir: Path, ranks: Ranks, lease: Lease, stop: Stop
) -> Outcome:
    """Sessions one after the other until one ends the life; a rollback opens the next."""
    rollback: Rollback | None = None
    while True:
        lived = _session(config, observers, run_dir, ranks, lease, stop, rollback)
        if isinstance(lived, Outcome):
            return lived
        rollback = lived
        gc.collect()  # its model, moments and graphs, before the next session has its own


def _session(
    config: PretrainConfig,
    observers: Sequence[Observer],
    run_dir: Path,
    ranks: Ranks,
    lease: Lease,
    stop: Stop,
    rollback: Rollback | None,
) -> Outcome | Rollback:
    """One session, to its end or to the next rollback; nothing of it is referred to afterwards."""
    with contextlib.ExitStack() as stack:
        session = open_session(config, run_dir, ranks, lease, observers, stack, rollback)
        try:
            return _finish(session, train(session, stop))
        except Rollback as request:
            session.events("rollback", **request.said())
            return request.with_traceback(None)  # the traceback would hold the session


def train(session: Session, stop: Stop) -> Outcome:
    """The loop (collective). Every step either updates the weights or is skipped by all ranks alike."""
    stream = session.stream
    for step in range(session.start + 1, session.steps + 1):  # the number of complete steps once this one is
        batch = session.loader[stream]
        stream += 1
        tensors = backward(
            session.engine,
            session.task,
            batch,
            session.config.compute.micro_batch,
            seed=_chunk_seed(session, step),
            describe=session.monitor.due(step),
        )
        rate = session.rate(step - 1)
        result = session.engine.step(rate)
        session.ema.update(step)
        session.monitor.observe(step, batch, tensors, result, lr=rate, wait_s=session.loader.wait_s)
        session.watchdog.beat(step)
        stopping = stop.agreed()
        last = stopping or step == session.steps
        saving = last or due(step, session.config.checkpoints.save_every)
        sick = look(session, step, stream, always=saving)
        if last or (saving and not sick):  # what is restored later shall be well
            save(session, step, stream)
        if stopping:
            return Outcome("preempted" if step < session.steps else "finished", step)
    return Outcome("finished", session.steps)


def look(session: Session, step: int, stream: int, *, always: bool) -> bool:
    """Read the metrics when due, or `always`; returns whether the newest step was bad (collective)."""
    if session.lease.lost:
        session.lease.check()
    watch(session, step)
    if not (always or session.monitor.due(step)):
        return False
    reading = session.monitor.read()
    if reading.last is not None:
        session.display.show(reading.last)
        advise(session, reading)
    judge(session, reading, step, stream)
    return reading.sick


def watch(session: Session, step: int) -> None:
    """Begin the evaluations that are due, and log the figures of those that have ended (collective)."""
    if session.observing is not None:
        last, alive = step == session.steps, session.watchdog.alive
        with aside(session):
            session.observing.begin(step, session.ema, patient=last, alive=alive)
            if last:  # the others wait with rank 0, however long that takes
                distributed.barrier(session.ranks, alive=alive)
        session.monitor.observed(session.observing.rows())


def advise(session: Session, reading: Reading) -> None:
    """Say once per life when the training waits for data, on which rank, and what to do about it."""
    row = reading.last
    assert row is not None
    warm = row["step"] > session.start + 3 * session.config.monitor.log_every
    if warm and not session.is_advised and reading.wait_s > 0.25 * row["step_s"]:
        session.is_advised = True
        session.events("waits_for_data", rank=reading.waiting, advice=session.loader.advice())


def save(session: Session, step: int, stream: int) -> None:
    """Take a checkpoint (collective); rank 0 writes it, in the background if so configured."""
    with aside(session):
        session.monitor.sync()
        session.num_saves += 1
        snapshot = saver.take(session.engine, session.ema, session.state(step, stream))
        if snapshot is not None:
            session.saver.save(snapshot)


@contextlib.contextmanager
def aside(session: Session) -> Iterator[None]:
    """Time spent inside is no step's: neither the watchdog nor the figures of speed count it."""
    session.watchdog.alive()
    begin = time.perf_counter()
    yield
    session.monitor.exclude(time.perf_counter() - begin)
    session.watchdog.alive()


def _chunk_seed(session: Session, step: int) -> int:
    """Starts torch's generator for dropout and the like; differs between steps and ranks."""
    return (session.config.seed * 1_000_003 + step) * 4096 + session.ranks.rank


def _finish(session: Session, outcome: Outcome) -> Outcome:
    """Join what is done in the background; export a finished run (collective)."""
    session.saver.join()
    if session.observing is not None:
        patience_s = None if outcome.status == "finished" else GRACE_S
        session.observing.join(patience_s, alive=session.watchdog.alive)
        session.monitor.observed(session.observing.rows())
    if outcome.status == "finished" and session.ranks.first:
        from pretrain.export import export

        session.lease.check()
        export(session.run_dir, session.run_dir / "export")
    session.events(outcome.status, step=outcome.step)
    distributed.barrier(session.ranks, alive=session.watchdog.alive)
    return outcome
