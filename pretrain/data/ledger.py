"""Samples that could not be used: what replaces them, where they are written down, and when they are too many.

Owns: skipped.jsonl of a run, one JSON object per broken sample: sample, shard, key, reason. All ranks append to one
file, each line in one write; a sample stands there once, also after restarts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from configs.errors import UserError
from pretrain.runlog import append_row

# A share of broken samples is judged from this many samples on, or from the whole set where it is smaller.
LEAST_SEEN = 1000


@dataclass(frozen=True)
class Skipped:
    """A broken sample: its id, where it lies, and why it cannot be used."""

    sample: int
    shard: str
    key: str
    reason: str


class Ledger:
    """The broken samples that this process met.

    Args:
        path: skipped.jsonl; None: only counted.
        num_samples: in the set.
        max_broken: share of the samples seen above which `add` raises.
    """

    def __init__(self, path: Path | None, *, num_samples: int, max_broken: float) -> None:
        self.path, self.num_samples, self.max_broken = path, num_samples, max_broken
        self.seen = 0
        self.broken: dict[int, Skipped] = {}
        self._written: set[int] = set()
        self._read = 0

    def add(self, seen: int, skipped: Iterable[Skipped]) -> None:
        """Count `seen` samples of the stream, and write down those that were broken.

        Raises:
            UserError: more than `max_broken` of the samples seen are broken.
        """
        self.seen += seen
        new = [entry for entry in skipped if entry.sample not in self.broken]
        if not new:
            return
        self.broken.update((entry.sample, entry) for entry in new)
        self._write(new)
        judged = min(self.num_samples, max(self.seen, LEAST_SEEN))
        if len(self.broken) > self.max_broken * judged:
            last = new[-1]
            where = f"; all are listed in {self.path}" if self.path else ""
            raise UserError(
                f"{len(self.broken)} of {judged} samples are broken, more than data.max_broken={self.max_broken} "
                f"allows. The last: {last.shard}, {last.key}: {last.reason}{where}. Repair the shards "
                "(pretrain/make_shards.py --verify names the bad ones) or raise data.max_broken"
            )

    def _write(self, entries: list[Skipped]) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._read_others()
        for entry in entries:
            if entry.sample in self._written:
                continue
            self._written.add(entry.sample)
            append_row(self.path, asdict(entry))

    def _read_others(self) -> None:
        """Learn what is in the file already: from before a restart, and from other ranks."""
        if not self.path or not self.path.exists() or os.path.getsize(self.path) == self._read:
            return
        for line in self.path.read_bytes().splitlines():
            try:
                self._written.add(int(json.loads(line)["sample"]))
            except (ValueError, KeyError, TypeError):
                continue  # cut short by a crash
        self._read = os.path.getsize(self.path)
