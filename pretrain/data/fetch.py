"""Samples of the stream, whatever state they are in: read, transform, and replace those that are broken.

Owns: what a loader worker does with samples. A pure function of (seed, epoch, sample) and the shards: a broken sample
is replaced by the same others in any process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import numpy as np

from configs.errors import UserError
from pretrain.data import counter
from pretrain.data.decode import BrokenImageError
from pretrain.data.ledger import Skipped
from pretrain.data.shards import DamagedSample

# Replacements tried before giving up: with half the set broken, all fail once in 10^15.
TRIES = 50

BLOCK = 16  # samples held in memory as they are encoded

Work = Callable[[], dict[str, np.ndarray]]


class Transform(Protocol):
    """What is done to a sample on the host. May have `parts`, the names of the parts that it wants read."""

    def draws(self, epochs: np.ndarray, samples: np.ndarray) -> Any:
        """What is random in samples of the stream, for each by itself: int64 [n] each -> array or list of n."""
        ...

    def __call__(self, parts: Mapping[str, Any], draws: Any) -> Work:
        """Look at a sample, given its draws, and return what is left to do: all that takes long.

        The work returns arrays, of the same shapes and types for every sample.

        Raises:
            BrokenImageError: the sample is unusable; the work may find this too.
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
        read_s, transform_s: seconds spent so far on reading samples and looking at them, and on decoding and cropping.
    """

    reader: Reader
    transform: Transform
    seed: int
    num_samples: int
    read_s: float = field(default=0.0)
    transform_s: float = field(default=0.0)

    def fetch(
        self, epochs: np.ndarray, samples: np.ndarray, in_hand: np.ndarray | None = None
    ) -> Iterator[tuple[int, dict[str, np.ndarray], list[Skipped]]]:
        """For each sample, int64 [n]: the one that is used, its arrays, the broken ones met on the way to it.

        BLOCK samples are begun before the first is finished, and draws are made for all at once: after an image is
        decoded, the processor has forgotten Python, which then takes several times as long.

        Args:
            in_hand: int64 [1], told which sample is worked on.

        Raises:
            UserError: no replacement could be used either.
        """
        planned = zip(epochs.tolist(), samples.tolist(), self.transform.draws(epochs, samples))
        while block := list(islice(planned, BLOCK)):
            begun = []
            for _, sample, draws in block:
                _tell(in_hand, sample)
                begun.append(self._begin(sample, draws))
            for (epoch, sample, _), work in zip(block, begun):
                _tell(in_hand, sample)
                yield self._whole(epoch, sample, work)

    def _whole(self, epoch: int, sample: int, work: Work | Skipped) -> tuple[int, dict[str, np.ndarray], list[Skipped]]:
        """A sample, or what stands in for it."""
        skipped: list[Skipped] = []
        used = sample
        for attempt in range(TRIES):
            result = work if isinstance(work, Skipped) else self._finish(used, work)
            if not isinstance(result, Skipped):
                return used, result, skipped
            skipped.append(result)
            used = replacement(self.seed, epoch, sample, attempt, self.num_samples)
            work = self._begin(used, self.transform.draws(np.array([epoch]), np.array([used]))[0])
        last = skipped[-1]
        raise UserError(
            f"{TRIES} samples in a row are broken, the last: {last.shard}, {last.key}: {last.reason}. Check the shards "
            "with pretrain/make_shards.py --verify, and data.parts and data.max_pixels"
        )

    def _begin(self, sample: int, draws: Any) -> Work | Skipped:
        """Read a sample and look at it."""
        begin = time.perf_counter()
        try:
            return self.transform(self.reader.read(sample, only=getattr(self.transform, "parts", None)), draws)
        except DamagedSample as error:
            return Skipped(sample, error.shard, error.key, error.reason)
        except BrokenImageError as error:
            return self._broken(sample, error)
        finally:
            self.read_s += time.perf_counter() - begin

    def _finish(self, sample: int, work: Work) -> dict[str, np.ndarray] | Skipped:
        begin = time.perf_counter()
        try:
            return work()
        except BrokenImageError as error:
            return self._broken(sample, error)
        finally:
            self.transform_s += time.perf_counter() - begin

    def _broken(self, sample: int, error: BrokenImageError) -> Skipped:
        return Skipped(sample, *place_of(self.reader.index, sample), str(error))


def _tell(in_hand: np.ndarray | None, sample: int) -> None:
    if in_hand is not None:
        in_hand[0] = sample


def replacement(seed: int, epoch: int, sample: int, attempt: int, num_samples: int) -> int:
    """What stands in for a broken sample of an epoch, in the order in which it is tried."""
    return counter.key_int(seed, epoch, sample, attempt, "replacement") % num_samples


def place_of(index: Any, sample: int) -> tuple[str, str]:
    """(shard's name, key) of a sample, for messages."""
    shard = int(index.shard_of(np.asarray(sample)))
    return index.shard_name(shard), index.keys([sample])[0]
