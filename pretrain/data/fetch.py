"""One sample of the stream, whatever state it is in: read, transform, and replace it where it is broken.

Owns: what a loader worker does with a sample. A pure function of (seed, epoch, sample) and the shards: a broken sample
is replaced by the same others in any process.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from configs.errors import UserError
from pretrain.data import counter
from pretrain.data.decode import BrokenImageError
from pretrain.data.ledger import Skipped
from pretrain.data.shards import DamagedSample

# Replacements tried before giving up: with half the set broken, all fail once in 10^15.
TRIES = 50


class Transform(Protocol):
    """What is done to a sample on the host. May have `parts`, the names of the parts that it wants read."""

    def __call__(self, parts: dict[str, Any], epoch: int, sample: int, key: int) -> dict[str, np.ndarray]:
        """Arrays of the same shapes and types for every sample; raises BrokenImageError for one that is unusable.

        `key`: 64 random bits of (seed, epoch, sample).
        """
        ...


class Reader(Protocol):
    """Where samples are read from: shards.ShardReader, or keep.Kept."""

    index: Any

    def read(self, sample: int, *, only: Any = None) -> Mapping[str, Any]:
        """Parts of a sample by name."""
        ...


@dataclass
class Fetcher:
    """Reads and transforms samples.

    Attributes:
        read_s, transform_s: seconds spent so far on reading, and on decoding and cropping.
    """

    reader: Reader
    transform: Transform
    seed: int
    num_samples: int
    read_s: float = field(default=0.0)
    transform_s: float = field(default=0.0)

    def fetch(self, epoch: int, sample: int) -> tuple[int, dict[str, np.ndarray], list[Skipped]]:
        """(the sample that is used, its arrays, the broken ones met on the way to it).

        Raises:
            UserError: no replacement could be used either.
        """
        skipped: list[Skipped] = []
        used = sample
        for attempt in range(TRIES):
            try:
                return used, self._once(epoch, used), skipped
            except DamagedSample as error:
                skipped.append(Skipped(used, error.shard, error.key, error.reason))
            except BrokenImageError as error:
                skipped.append(Skipped(used, *place_of(self.reader.index, used), str(error)))
            used = replacement(self.seed, epoch, sample, attempt, self.num_samples)
        last = skipped[-1]
        raise UserError(
            f"{TRIES} samples in a row are broken, the last: {last.shard}, {last.key}: {last.reason}. Check the shards "
            "with pretrain/make_shards.py --verify, and data.parts and data.max_pixels"
        )

    def _once(self, epoch: int, sample: int) -> dict[str, np.ndarray]:
        begin = time.perf_counter()
        parts = dict(self.reader.read(sample, only=getattr(self.transform, "parts", None)))
        read = time.perf_counter()
        try:
            return self.transform(parts, epoch, sample, counter.key_int(self.seed, epoch, sample, 0, "transform"))
        finally:
            self.read_s += read - begin
            self.transform_s += time.perf_counter() - read


def replacement(seed: int, epoch: int, sample: int, attempt: int, num_samples: int) -> int:
    """What stands in for a broken sample of an epoch, in the order in which it is tried."""
    return counter.key_int(seed, epoch, sample, attempt, "replacement") % num_samples


def place_of(index: Any, sample: int) -> tuple[str, str]:
    """(shard's name, key) of a sample, for messages."""
    shard = int(index.shard_of(np.asarray(sample)))
    return index.shard_name(shard), index.keys([sample])[0]
