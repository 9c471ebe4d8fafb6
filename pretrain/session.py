"""Everything that is open while a run trains: built from the configuration and the newest checkpoint.

Owns: the order in which task, engine, average, loader, monitor and saver come to be, and the state that a checkpoint
records beside the tensors. Closing is the caller's ExitStack.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.changes import check_length
from configs.errors import UserError
from configs.loader import dump
from configs.schema import PretrainConfig
from pretrain import kernels, resume
from pretrain.checkpoint import Snapshot, write_synced
from pretrain.data.loader import Loader
from pretrain.display import Display
from pretrain.distributed import Ranks, once
from pretrain.ema import Ema
from pretrain.engine import Engine, Moments
from pretrain.lease import Lease
from pretrain.microbatch import chunks
from pretrain.monitor import Monitor, Sink, TensorBoard, WeightsAndBiases
from pretrain.observing import Observer, Observing
from pretrain.runlog import Events, MetricsFile
from pretrain.saver import Saver
from pretrain.schedule import make_schedule
from pretrain.sickness import Rollback
from pretrain.tasks import Task, make_task
from pretrain.watchdog import Watchdog


@dataclass
class Session:
    """What the loop works with, on one rank."""

    config: PretrainConfig
    run_dir: Path
    ranks: Ranks
    lease: Lease
    events: Events
    task: Task
    engine: Engine
    ema: Ema
    loader: Loader
    monitor: Monitor
    display: Display
    saver: Saver
    watchdog: Watchdog
    rate: Callable[[int], float]
    observing: Observing | None
    start: int  # complete steps at the beginning
    stream: int  # number of the next batch of the data stream: the step, plus what rollbacks skipped
    steps: int
    is_retry: bool  # begun by a rollback
    num_saves: int = 0  # checkpoints taken since the beginning
    is_advised: bool = False  # the user knows that data is the bottleneck

    def keys(self, samples: Tensor) -> Iterable[str]:
        """Keys of samples in the shards."""
        return self.loader.index.keys(samples.numpy())

    def state(self, step: int, stream: int) -> dict[str, Any]:
        """What a checkpoint records beside the tensors."""
        return {
            "step": step,
            "stream": stream,
            "steps": self.steps,
            "world_size": self.ranks.world_size,
            "zero_stage": self.engine.stage,
            "data_fingerprint": self.loader.index.fingerprint,
            "config": self.config.model_dump(mode="json"),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }


def open_session(
    config: PretrainConfig,
    run_dir: Path,
    ranks: Ranks,
    lease: Lease,
    observers: Sequence[Observer],
    stack: contextlib.ExitStack,
    rollback: Rollback | None = None,
) -> Session:
    """Build everything for a life, or for going on after a rollback (collective).

    Raises:
        UserError: something in the configuration, the data or the checkpoint does not fit.
    """
    lease.check()
    events = Events(run_dir / "events.jsonl" if ranks.first else None)
    snapshot = resume.find(run_dir, ranks, events)
    if snapshot is not None:
        resume.check_config(snapshot, config, run_dir, events)
    task = _make_task(config, snapshot, events)
    _check_norms(task.module, config, ranks)
    rows = _prepare(task, config, ranks, run_dir)
    observing = _make_observing(observers, task, config, ranks, events, stack)
    engine = _make_engine(task, config, ranks, snapshot)
    loader = _make_loader(config, task, run_dir, ranks)
    stack.callback(loader.close)
    if snapshot is not None:
        resume.check_data(snapshot, loader.index.fingerprint)
    for note in loader.index.warnings() if ranks.first and rollback is None else ():
        events("irregular_data", note=note)
    start, steps = 0 if snapshot is None else snapshot.step, config.num_steps(len(loader))
    check_length(steps, start, str(run_dir))
    ema = _make_ema(engine, config, steps, snapshot)
    session = Session(
        config=config,
        run_dir=run_dir,
        ranks=ranks,
        lease=lease,
        events=events,
        task=task,
        engine=engine,
        ema=ema,
        loader=loader,
        monitor=_make_monitor(config, run_dir, ranks, start, stack, is_observed=observing is not None),
        display=_make_display(config, start, steps, ranks, events, stack),
        saver=_make_saver(config, run_dir, lease, events, stack),
        watchdog=_make_watchdog(config, run_dir, ranks, stack),
        rate=make_schedule(config, len(loader)),
        observing=observing,
        start=start,
        stream=_stream(snapshot, rollback),
        steps=steps,
        is_retry=rollback is not None,
    )
    kernel = {row["layer"]: row["kernel"] for row in rows}
    events("started", step=start, steps=steps, world_size=ranks.world_size, zero_stage=engine.stage, kernels=kernel)
    return session


def _stream(snapshot: Snapshot | None, rollback: Rollback | None) -> int:
    """Number of the batch to begin with: the step, plus what rollbacks have skipped."""
    if rollback is not None:
        return rollback.stream
    return 0 if snapshot is None else int(snapshot.state["stream"])


def _make_task(config: PretrainConfig, snapshot: Snapshot | None, events: Events) -> Task:
    """The task with the weights to start from: the checkpoint's, those of `init_from`, or fresh ones from the seed."""
    torch.manual_seed(config.seed)
    task = make_task(config)
    if snapshot is not None:
        resume.load_weights(task.module, snapshot.tensors["weights"], "the checkpoint")
    elif config.init_from is not None:
        loaded = resume.initialise_from(config.init_from, task.module, task.backbone)
        events("initialised", source=config.init_from, loaded=loaded)
    return task


def _make_engine(task: Task, config: PretrainConfig, ranks: Ranks, snapshot: Snapshot | None) -> Engine:
    moments = None
    if snapshot is not None:
        moments = Moments(snapshot.tensors.get("moments", {}), int(snapshot.state["optimizer_step"]))
    task.module.train()
    return Engine(task, config.compute, config.optimizer, ranks, moments)


def _make_ema(engine: Engine, config: PretrainConfig, steps: int, snapshot: Snapshot | None) -> Ema:
    ema = Ema(engine, config.ema, steps)
    if snapshot is not None and "ema" in snapshot.tensors:
        ema.load(snapshot.tensors["ema"], int(snapshot.state["ema_updates"]))
    return ema


def _check_norms(module: nn.Module, config: PretrainConfig, ranks: Ranks) -> None:
    """BatchNorm sees one rank's chunk: results would depend on how a step is computed, which nothing here may."""
    has = any(isinstance(child, nn.modules.batchnorm._BatchNorm) for child in module.modules())
    if has and (ranks.world_size > 1 or config.compute.micro_batch is not None):
        raise UserError(
            f"model.name={config.model.name} has BatchNorm, whose result depends on the number of processes and on "
            "compute.micro_batch: use one process without micro-batches, or a model without BatchNorm"
        )


def _prepare(task: Task, config: PretrainConfig, ranks: Ranks, run_dir: Path) -> list[kernels.Row]:
    """Put the task on its device and choose how its backbone computes (collective)."""
    task.module.to(ranks.device)
    first = chunks(config.batch_size // ranks.world_size, config.compute.micro_batch)[0]
    images = (first.stop - first.start) * views_of(config)
    return kernels.set_up(task.backbone, config.compute, ranks, run_dir, images=images)


def views_of(config: PretrainConfig) -> int:
    """Views of a sample that go through the model."""
    return 2 if config.task.name == "simclr" else 1


def _make_loader(config: PretrainConfig, task: Task, run_dir: Path, ranks: Ranks) -> Loader:
    return Loader(
        config.data,
        config.loading,
        task.transform,
        seed=config.seed,
        batch_size=config.batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=ranks.device,
        ledger=run_dir / "skipped.jsonl",
        once=partial(once, ranks=ranks),
    )


def _make_monitor(
    config: PretrainConfig, run_dir: Path, ranks: Ranks, start: int, stack: contextlib.ExitStack, *, is_observed: bool
) -> Monitor:
    metrics, observed, sinks = None, None, list[Sink]()
    if ranks.first:
        if not (run_dir / "config.yaml").exists():  # started without the launcher
            write_synced(run_dir / "config.yaml", dump(config).encode())
        metrics = MetricsFile(run_dir / "metrics.jsonl", start)
        observed = MetricsFile(run_dir / "observed.jsonl", start) if is_observed else None
        if config.monitor.tensorboard:
            sinks.append(TensorBoard(run_dir / "tensorboard", start))
        if config.monitor.wandb is not None:
            sinks.append(WeightsAndBiases(config.monitor.wandb, config.name, run_dir, config.model_dump(mode="json")))
    views = config.batch_size * views_of(config)
    monitor = Monitor(config.monitor, ranks, metrics=metrics, observed=observed, sinks=sinks, views=views)
    stack.callback(monitor.close)
    return monitor


def _make_observing(
    observers: Sequence[Observer],
    task: Task,
    config: PretrainConfig,
    ranks: Ranks,
    events: Events,
    stack: contextlib.ExitStack,
) -> Observing | None:
    if not observers:
        return None
    observing = Observing(observers, task, config, ranks, report=events)
    stack.callback(observing.close)
    return observing


def _make_display(
    config: PretrainConfig, start: int, steps: int, ranks: Ranks, events: Events, stack: contextlib.ExitStack
) -> Display:
    display = Display(config.name, start, steps, enabled=ranks.first)
    stack.callback(display.close)
    events.say = display.say
    return display


def _make_saver(
    config: PretrainConfig, run_dir: Path, lease: Lease, events: Events, stack: contextlib.ExitStack
) -> Saver:
    saver = Saver(run_dir, config.checkpoints, report=events, allowed=lease.check)
    stack.callback(saver.join)
    return saver


def _make_watchdog(config: PretrainConfig, run_dir: Path, ranks: Ranks, stack: contextlib.ExitStack) -> Watchdog:
    watchdog = Watchdog(
        run_dir / "logs" / f"hang_rank{ranks.rank}.txt",
        rank=ranks.rank,
        least_s=config.resilience.watchdog_s,
        factor=config.resilience.watchdog_factor,
    )
    watchdog.start()
    stack.callback(watchdog.close)
    return watchdog
