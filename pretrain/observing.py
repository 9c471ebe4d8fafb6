"""Evaluation while training, off its critical path: in a process of its own, on a copy of the averaged weights.

Owns: the protocol between the trainer and evaluations that it knows nothing of (they come in from above, by
`run(config, observers=...)`), and when they run. The training pays for a copy to host memory. One evaluation is under
way at a time, at low priority and on one thread; its process shares neither random numbers nor memory with the
training, so that looking changes nothing. Figures arrive later, with the step that they belong to.
"""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import queue
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from pretrain import kernels
from pretrain.data.workers import LEFT_TO_TRAINER, fork_server
from pretrain.resume import part_of, prefix_of
from pretrain.schedule import due

if TYPE_CHECKING:
    from configs.schema import PretrainConfig
    from pretrain.distributed import Ranks
    from pretrain.ema import Ema
    from pretrain.tasks import Task

Row = dict[str, Any]
NICENESS = 10
GRACE_S = 15.0  # what an evaluation still gets when the training is asked to stop


class Observer(Protocol):
    """An evaluation made every `every` steps. Picklable."""

    every: int

    def observe(self, backbone: Any, config: PretrainConfig, device: torch.device) -> dict[str, float]:
        """Figures to log, by name, of a backbone in evaluation mode."""
        ...


@dataclass(frozen=True)
class Job:
    """What the evaluating process gets."""

    observers: Sequence[Observer]
    backbone: nn.Module  # on the host
    config: PretrainConfig
    device: torch.device

    def run(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        with torch.no_grad():
            backbone = self.backbone.to(self.device)
            for observer in self.observers:
                figures |= observer.observe(backbone, self.config, self.device)
        return figures


class Observing:
    """The evaluations of a life. To be made before DeepSpeed takes the module apart.

    Args:
        report: called as `report(event, **fields)` about an evaluation that failed or was left out.
    """

    def __init__(
        self,
        observers: Sequence[Observer],
        task: Task,
        config: PretrainConfig,
        ranks: Ranks,
        *,
        report: Callable[..., None],
    ) -> None:
        self._observers, self._config, self._ranks, self._report = observers, config, ranks, report
        self._prefix = prefix_of(task.module, task.backbone)
        self._backbone = copy.deepcopy(task.backbone).cpu().eval().requires_grad_(False)
        kernels.fastest(self._backbone)  # what is compiled for training would be compiled again for evaluation
        self._thread: threading.Thread | None = None
        self._process: Any = None
        self._is_closing = False
        self._rows: queue.SimpleQueue[Row] = queue.SimpleQueue()

    def begin(
        self, step: int, ema: Ema, *, patient: bool = False, alive: Callable[[], None] = lambda: None
    ) -> None:  # fmt: skip
        """Have what is due after `step` complete steps evaluated (collective).

        While an earlier evaluation runs this one is left out, loudly; if `patient`, it waits instead (see `join`).
        """
        wanted = [observer for observer in self._observers if due(step, observer.every)]
        if not wanted:
            return
        weights = part_of(ema.weights(), self._prefix)
        if not self._ranks.first:
            return
        if patient:
            self.join(alive=alive)
        if self._thread is not None and self._thread.is_alive():
            reason = "the one before still runs; raise the interval in observers, or lower observers.images"
            self._report("not_observed", step=step, reason=reason)
            return
        self._backbone.load_state_dict(weights)
        job = Job(wanted, self._backbone, self._config, self._ranks.device)
        self._thread = threading.Thread(target=self._evaluate, args=(step, job), name="observer", daemon=True)
        self._thread.start()

    def rows(self) -> list[Row]:
        """Figures that have arrived since the last call, each with its step."""
        return [self._rows.get() for _ in range(self._rows.qsize())]

    def join(self, timeout_s: float | None = None, *, alive: Callable[[], None] = lambda: None) -> None:
        """Wait for the evaluation under way; `alive` is called every second."""
        deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        while self._thread is not None and self._thread.is_alive() and time.monotonic() < deadline:
            self._thread.join(1.0)
            alive()

    def close(self) -> None:
        """End the evaluation under way."""
        self._is_closing = True
        if self._thread is not None:
            if self._process is not None:
                self._process.kill()
            self._thread.join(GRACE_S)

    def _evaluate(self, step: int, job: Job) -> None:
        """In a thread, which only waits: start the process, hand over the job, take the figures."""
        signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_TO_TRAINER)
        ours, theirs = fork_server().Pipe()
        process = fork_server().Process(target=serve, args=(theirs,), daemon=True, name="observer")
        process.start()
        self._process = process
        theirs.close()
        try:
            ours.send_bytes(pickle.dumps(job))  # `send` would share the tensors' memory instead of copying it
            answer = ours.recv()  # from our own child, over a pipe that nobody else holds
        except (EOFError, OSError, pickle.PicklingError) as error:
            early = f"its process ended early ({type(error).__name__} {error})"
            answer = "the training ended before it did" if self._is_closing else early
        finally:
            ours.close()
        if isinstance(answer, dict):
            self._rows.put({"step": step, **answer})
        else:
            self._report("not_observed", step=step, reason=answer)
        process.join()


def serve(pipe: connection.Connection) -> None:
    """The evaluating process: one job from its trainer, its figures or what went wrong back."""
    signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_TO_TRAINER)
    torch.set_num_threads(1)
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    try:
        answer: dict[str, float] | str = pickle.loads(pipe.recv_bytes()).run()
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    with contextlib.suppress(OSError):  # the trainer is gone
        pipe.send(answer)
