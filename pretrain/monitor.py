"""What is measured while training: gathered without waiting for the device, read every `log_every` steps.

Owns: the rows of metrics.jsonl, TensorBoard and Weights & Biases, and the look at them for steps that went wrong. A
step's tensors stay on the device until they are read, all at once; each step still gets its row.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from configs.schema import Monitor as MonitorConfig
from pretrain.distributed import Ranks, largest_over_ranks, mean_over_ranks
from pretrain.runlog import MetricsFile
from pretrain.schedule import due

if TYPE_CHECKING:
    from pretrain.data.batch import Batch
    from pretrain.engine import StepResult

RECENT = 100  # steps that a loss is compared with
SPIKE = 10.0  # times their usual deviation, to be a spike
TELL_EVERY = 1000  # steps in which one spike is told: a loss that hardly varies, as on a plateau, has many


@dataclass(frozen=True)
class Record:
    """One step before it is read."""

    step: int  # complete steps, with this one
    lr: float
    samples: Tensor  # [b] int64 of this rank
    tensors: dict[str, Tensor]
    wait_s: float  # for data, of this rank
    norms: dict[str, Tensor] | None = None


@dataclass
class Reading:
    """What a look at the last steps found: equal on all ranks."""

    bad: list[Record] = field(default_factory=list)  # steps skipped for a gradient that was not finite
    bad_in_row: int = 0  # the longest unbroken series of them that ends among these steps
    sick: bool = False  # the newest step was one of them
    spikes: list[tuple[Record, dict[str, float]]] = field(default_factory=list)
    last: dict[str, Any] | None = None
    wait_s: float = 0.0  # usual wait for data of the rank that waited longest
    waiting: int = 0  # the rank that most often was that one


class Sink(Protocol):
    """Somewhere rows go."""

    def write(self, row: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class Monitor:
    """Gathers steps and reads them. `observe` and `read` are called by every rank at the same steps.

    Args:
        metrics, observed: files on rank 0, None elsewhere: rows of steps, and of evaluations.
        views: images that one sample counts for in views_per_s, times the global batch.
    """

    def __init__(
        self,
        config: MonitorConfig,
        ranks: Ranks,
        *,
        metrics: MetricsFile | None,
        sinks: list[Sink],
        views: int,
        observed: MetricsFile | None = None,
    ) -> None:
        self._config, self._ranks, self._metrics, self._sinks, self._views = config, ranks, metrics, sinks, views
        self._observed = observed
        self._pending: list[Record] = []
        self._losses: deque[float] = deque(maxlen=RECENT)
        self._bad_in_row = 0
        self._told, self._untold = -TELL_EVERY, 0  # step of the last spike that was told, and how many were not since
        self._clock = time.perf_counter()

    def observe(
        self, step: int, batch: Batch, tensors: dict[str, Tensor], result: StepResult, *, lr: float, wait_s: float
    ) -> None:
        """Take note of a complete step; reads nothing from the device."""
        tensors = tensors | {"grad_norm": result.grad_norm, "skipped": result.skipped}
        self._pending.append(Record(step, lr, batch.samples, tensors, wait_s, result.norms))

    def observed(self, rows: list[dict[str, Any]]) -> None:
        """Write figures of evaluations, each with the step that it belongs to, which may lie back."""
        if rows and self._observed is not None:
            self._observed.append(rows)
            for sink in self._sinks:
                for row in rows:
                    sink.write(row)

    def due(self, step: int) -> bool:
        """True after the steps at which `read` is to be called."""
        return due(step, self._config.log_every)

    def read(self) -> Reading:
        """Read what was gathered, write the rows, and say what stands out (collective; device sync)."""
        if not self._pending:
            return Reading()
        rows = self._rows()
        reading = Reading(last=rows[-1])
        reading.wait_s = statistics.median(row["data_wait_s"] for row in rows)
        reading.waiting = statistics.mode(row["data_wait_rank"] for row in rows)
        for record, row in zip(self._pending, rows):
            self._judge(record, row, reading)
        reading.sick = self._bad_in_row > 0
        if self._metrics is not None:
            self._metrics.append(rows)
        for sink in self._sinks:
            sink.write(rows[-1])
        self._pending = []
        return reading

    def exclude(self, seconds: float) -> None:
        """Do not count this time (saving, evaluating) as that of steps."""
        self._clock += seconds

    def sync(self) -> None:
        """Have all rows on disk."""
        for file in (self._metrics, self._observed):
            if file is not None:
                file.sync()

    def close(self) -> None:
        """Close files and sinks."""
        for sink in self._sinks:
            sink.close()
        for file in (self._metrics, self._observed):
            if file is not None:
                file.close()

    def _rows(self) -> list[dict[str, Any]]:
        waits = largest_over_ranks([record.wait_s for record in self._pending], self._ranks)  # beside the sync
        values = [t.detach().float().reshape(()) for record in self._pending for t in record.tensors.values()]
        flat = mean_over_ranks(torch.stack(values).cpu(), self._ranks).tolist()  # the one sync of log_every steps
        now = time.perf_counter()
        step_s, self._clock = (now - self._clock) / len(self._pending), now
        rows, numbers = [], iter(flat)
        for record, (wait_s, rank) in zip(self._pending, waits()):
            row: dict[str, Any] = {"step": record.step, **{name: next(numbers) for name in record.tensors}}
            row |= {"lr": record.lr, "views_per_s": self._views / step_s, "step_s": step_s}
            row |= {"data_wait_s": wait_s, "data_wait_rank": rank}
            row["skipped"] = bool(row["skipped"])
            # JSON knows no NaN; null says that there is no number.
            rows.append({name: value if _finite(value) else None for name, value in row.items()})
        return rows

    def _judge(self, record: Record, row: dict[str, Any], reading: Reading) -> None:
        if row["skipped"]:
            self._bad_in_row += 1
            reading.bad_in_row = max(reading.bad_in_row, self._bad_in_row)
            reading.bad.append(record)
            return
        self._bad_in_row = 0
        loss = row["loss"]
        if loss is not None:
            if is_spike(loss, self._losses):
                row["spike"] = True
                self._untold += 1
                if record.step - self._told >= TELL_EVERY:
                    figures = {"loss": loss, "usual": statistics.median(self._losses), "spikes": self._untold}
                    reading.spikes.append((record, figures))
                    self._told, self._untold = record.step, 0
            self._losses.append(loss)


def is_spike(loss: float, recent: deque[float]) -> bool:
    """True for a loss that lies far above the recent ones, in units of their median absolute deviation."""
    if len(recent) < 20:
        return False
    middle = statistics.median(recent)
    deviation = statistics.median(abs(value - middle) for value in recent)
    return loss - middle > SPIKE * max(deviation, 1e-3 * abs(middle), 1e-12)


def _finite(value: float) -> bool:
    return value == value and value not in (float("inf"), float("-inf"))


class TensorBoard:
    """Scalars for TensorBoard; what stands there after `step` is marked as undone."""

    def __init__(self, folder: Path, step: int) -> None:
        from pretrain.quiet import quiet

        with quiet():
            from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Add the numbers of a row under train/."""
        for name, value in row.items():
            if name != "step" and isinstance(value, float):
                self._writer.add_scalar(f"train/{name}" if "/" not in name else name, value, row["step"])

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WeightsAndBiases:
    """Rows for Weights & Biases; a restarted run goes on under the same id."""

    def __init__(self, project: str, name: str, folder: Path, config: dict[str, Any]) -> None:
        from configs.errors import UserError

        try:
            import wandb
        except ImportError:
            raise UserError("monitor.wandb is set, but wandb is not installed: pip install wandb") from None
        self._run = wandb.init(
            project=project,
            id=name,
            name=name,
            dir=str(folder),
            config=config,
            resume="allow",
            settings={"quiet": True},
        )

    def write(self, row: dict[str, Any]) -> None:
        """Log a row; one that lies back goes to the newest step, since the service takes no earlier ones."""
        figures = {name: value for name, value in row.items() if name != "step"}
        self._run.log(figures, step=max(row["step"], self._run.step))

    def close(self) -> None:
        """Finish the life's part of the run."""
        self._run.finish(quiet=True)
