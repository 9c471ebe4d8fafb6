"""Saving while training: a copy in host memory, a thread that writes it, and what may go wrong on the way.

Owns: when the copy is taken, that at most one write is under way, retention, and that a full disk stops nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from configs.schema import Checkpoints
from pretrain import checkpoint
from pretrain.checkpoint import Snapshot

if TYPE_CHECKING:
    from pretrain.ema import Ema
    from pretrain.engine import Engine

Report = Callable[..., None]


def take(engine: Engine, ema: Ema, state: dict[str, Any]) -> Snapshot | None:
    """Copy the training state to host memory (collective); None on ranks other than 0."""
    moments = engine.moments()
    files = {"weights": engine.weights(), "moments": moments.tensors}
    averages = ema.weights() if ema.updates else {}
    if not engine.ranks.first:
        return None
    if averages:
        files["ema"] = averages
    state = state | {"optimizer_step": moments.step, "ema_updates": ema.updates}
    return Snapshot(state, {name: _to_host(tensors) for name, tensors in files.items()})


def _to_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory that training no longer touches (a device sync)."""
    copies = {name: t.detach().to("cpu", copy=True, non_blocking=t.is_cuda) for name, t in tensors.items()}
    if any(t.is_cuda for t in tensors.values()):
        torch.cuda.synchronize()
    return copies


class Saver:
    """Writes checkpoints of a run on rank 0, in the background if the configuration says so.

    Args:
        report: called as `report(event, **fields)` when a checkpoint is written, or could not be.
        allowed: raises `Fenced` when another life owns the run.
    """

    def __init__(self, run_dir: Path, config: Checkpoints, *, report: Report, allowed: Callable[[], None]) -> None:
        self._run_dir, self._config, self._report, self._allowed = run_dir, config, report, allowed
        self._thread: threading.Thread | None = None
        self._raised: Exception | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Write a snapshot, after the one before it is done."""
        self.join()
        if self._config.background:
            self._thread = threading.Thread(target=self._write, args=(snapshot,), name="saver")
            self._thread.start()
        else:
            self._write(snapshot)
            self.join()

    def join(self) -> None:
        """Wait for the write under way.

        Raises:
            Fenced: it found that another life owns the run. Anything else that ended it but for the disk's errors.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._raised is not None:
            raise self._raised

    def _write(self, snapshot: Snapshot) -> None:
        try:
            self._allowed()
            path = checkpoint.write(self._run_dir, snapshot, allowed=self._allowed)
            self._report("saved", step=snapshot.step, path=str(path.relative_to(self._run_dir)))
            checkpoint.remove_old(self._run_dir, keep_last=self._config.keep_last, keep_every=self._config.keep_every)
        except OSError as error:
            self._report(
                "save_failed",
                step=snapshot.step,
                reason=f"{error.strerror or error}: the training goes on, older checkpoints are untouched",
            )
        except Exception as error:  # raised where the training waits for the write
            self._raised = error
