"""Being told to stop, and stopping together.

Owns: the signals that ask a training to end (USR2 of submitit and SLURM, TERM), and the agreement of all ranks on the
step after which they do. Steps carry a small message of the ranks that travels while the next ones compute, so that
agreeing costs no waiting: a request is followed one step later, or a few steps among many ranks.
"""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from pretrain.distributed import Ranks

SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
RANKS_IN_STEP = 128  # that a message passes while a step computes: gloo's goes twice through all ranks, one by one
EARLY_REQUEST = "AKORN_STOP_REQUESTED"  # set to 1 by whoever had the signal before this handler was in place


class Stop:
    """A request to stop, made on any rank and agreed by all. Usable as a context that installs the handlers."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.requested = os.environ.get(EARLY_REQUEST) == "1"
        self._message = torch.zeros(1)
        self._every = max(1, ranks.world_size // RANKS_IN_STEP)  # steps that a message has to travel
        self._steps = 0
        self._work: dist.Work | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        """Take over the signals; only possible in the main thread, elsewhere a request comes through `requested`."""
        with contextlib.suppress(ValueError):
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        self.drain()
        if not self.requested:  # else a second signal must not kill the process while it closes its files
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        before = self._before.get(signal.Signals(number))
        if callable(before):  # the launcher's, which may have to act at once
            before(number, frame)

    def agreed(self) -> bool:
        """True on all ranks alike once any rank was asked to stop before the last message (collective, once a step)."""
        if self._ranks.world_size == 1:
            return self.requested
        self._steps += 1
        if self._steps % self._every:
            return False
        answer = self.drain()
        if not answer:
            self._message.fill_(float(self.requested))
            self._work = dist.all_reduce(self._message, op=dist.ReduceOp.MAX, group=self._ranks.messages, async_op=True)
        return answer

    def drain(self) -> bool:
        """Wait for the message on its way, if any, and return what it says."""
        if self._work is None:
            return False
        with contextlib.suppress(RuntimeError):  # a peer is gone: the next collective of the training says so
            self._work.wait()
        self._work = None
        return bool(self._message)
