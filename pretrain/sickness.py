"""Sick numerics: what is done about gradients that are not finite, and about spikes of the loss.

Owns: the way from a skipped step to a rollback to an end with a diagnosis. Every rank comes to the same decision, from
figures that are equal on all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import UserError
from pretrain.distributed import gather_int64
from pretrain.monitor import Reading, Record
from pretrain.runlog import append_row

if TYPE_CHECKING:
    from pretrain.session import Session

MOST_NORMS = 8  # layers named in the log of a spike


class Rollback(Exception):  # noqa: N818  (a request, not an error)
    """Go back to the last checkpoint and on from `stream`: the batches before it are not used again."""

    def __init__(self, step: int, stream: int) -> None:
        super().__init__(f"rollback after step {step}")
        self.step, self.stream = step, stream

    def said(self) -> dict[str, Any]:
        """Fields of the event."""
        return {"after_step": self.step, "skips_batches_before": self.stream}


class Diverged(UserError):  # noqa: N818  (a diagnosis)
    """The training cannot go on; the message is the diagnosis."""


def judge(session: Session, reading: Reading, step: int, stream: int) -> None:
    """Log what a reading found; raise where too many steps in a row went wrong (collective).

    Raises:
        Rollback: `max_bad_steps` in a row.
        Diverged: the same after a rollback, with no checkpoint since, or from the first step of the run on.
    """
    for record in reading.bad:
        _write_samples(session, record)
    for record, figures in reading.spikes:
        session.events("spike", step=record.step, **figures, **_norms(record))
    if reading.bad_in_row < session.config.resilience.max_bad_steps:
        return
    hopeless = reading.bad_in_row >= step  # not one good step in the whole run
    if hopeless or (session.is_retry and session.num_saves == 0):
        raise Diverged(_diagnosis(session, reading, step))
    raise Rollback(step, stream)


def _write_samples(session: Session, record: Record) -> None:
    """Put down the samples of a bad step: bad_batches.jsonl has their keys, events.jsonl the step (collective)."""
    samples = gather_int64(record.samples, session.ranks)
    if session.ranks.first:
        keys = [str(key) for key in session.keys(samples)]
        row = {"step": record.step, "samples": samples.tolist(), "keys": keys}
        append_row(session.run_dir / "bad_batches.jsonl", row)
    session.events("bad_step", step=record.step, reason="gradient not finite: not applied", keys="bad_batches.jsonl")


def _norms(record: Record) -> dict[str, Any]:
    """Largest gradient norms by parameter; DeepSpeed has them apart only at ZeRO stage 0 (device sync)."""
    if record.norms is None:
        return {"norms": "by layer only at compute.zero_stage=0"}
    numbers = {name: float(norm) for name, norm in record.norms.items()}
    largest = sorted(numbers, key=lambda name: -numbers[name])[:MOST_NORMS]
    return {"norms": {name: float(f"{numbers[name]:.4g}") for name in largest}}


def _diagnosis(session: Session, reading: Reading, step: int) -> str:
    rate, precision = session.rate(step - 1), session.config.compute.precision
    where = Path(session.run_dir) / "bad_batches.jsonl"
    return (
        f"the gradient was not finite in {reading.bad_in_row} steps in a row up to step {step}, and going back did not "
        f"help (learning rate {rate:.3g}, precision {precision}, clip {session.config.optimizer.clip}); look at the "
        f"samples in {where}, then lower optimizer.lr, set optimizer.clip"
        + (", or try compute.precision=fp32" if precision != "fp32" else " or make it smaller")
    )
