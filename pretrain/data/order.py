"""Which sample stands at which position of the training stream: a pure function, without state to save.

The stream is infinite. Position p lies in epoch p // N; inside an epoch the shards are permuted, cut into windows of
`window` shards, and the samples of each window are permuted. Every epoch contains each sample once. Nothing here knows
ranks or workers: step s takes positions [s*B, (s+1)*B), and rank r of W the r-th W-th of them.

Lanes (for remote shards on many nodes): the shards are dealt once to `lanes` groups of about equal numbers of samples,
each with an infinite stream of its own, and the i-th lanes-th of every batch comes from lane i. A process whose part of
the batch is whole lanes touches only their shards. Epochs are then counted by lane.

Permutations are Feistel networks over a * b >= n cells with cycle walking (Black, Rogaway, "Ciphers with arbitrary
finite domains", CT-RSA 2002): planning a step costs its own positions and one search, whatever the size of the set.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from configs.errors import UserError
from pretrain.data import counter

ROUNDS = 10


def permute(values: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Image of each value under the permutation of range(size) that its key selects; all int64/uint64, same shape."""
    rows = np.ceil(np.sqrt(sizes.astype(np.float64))).astype(np.uint64)
    columns = (sizes.astype(np.uint64) + rows - np.uint64(1)) // rows
    result = _feistel(values.astype(np.uint64), rows, columns, keys)
    outside = np.flatnonzero(result >= sizes.astype(np.uint64))
    while outside.size:  # a*b < n + sqrt(n): rarely more than one walk
        walked = _feistel(result[outside], rows[outside], columns[outside], keys[outside])
        result[outside] = walked
        outside = outside[walked >= sizes[outside].astype(np.uint64)]
    return result.astype(np.int64)


def _feistel(values: np.ndarray, rows: np.ndarray, columns: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """A permutation of range(rows * columns): each half is shifted in turn by a hash of the other."""
    row, column = values // columns, values % columns
    for turn in range(ROUNDS):
        round_keys = keys + np.uint64(((turn + 1) * counter.GAMMA) & counter.MASK)
        if turn % 2:
            column = (column + counter.mix(round_keys ^ row) % columns) % columns
        else:
            row = (row + counter.mix(round_keys ^ column) % rows) % rows
    return row * columns + column


@dataclass(frozen=True)
class Epoch:
    """The shards of a lane in the order of one epoch."""

    shards: np.ndarray
    """int64 [shards], positions in the index."""
    ends: np.ndarray
    """int64 [shards + 1], how many samples lie before each, and in all."""


class Order:
    """The training stream of a shard set.

    Args:
        shard_sizes: int64 [shards], samples in each shard, in the order of the index.
        seed: selects the stream.
        window: shards whose samples are shuffled together.
        lanes: groups of shards with a stream of their own each.
        batch_size: the global batch; needed where lanes > 1.

    Raises:
        UserError: there are no samples, more lanes than shards with samples, or a batch that lanes do not divide.
    """

    def __init__(
        self, shard_sizes: np.ndarray, *, seed: int, window: int, lanes: int = 1, batch_size: int | None = None
    ) -> None:
        sizes = np.asarray(shard_sizes, np.int64)
        filled = np.flatnonzero(sizes)
        if not filled.size:
            raise UserError("the shard set holds no samples: make it again with pretrain/make_shards.py")
        if lanes > filled.size:
            raise UserError(f"data.lanes={lanes} is more than the {filled.size} shards: use at most that many lanes")
        if lanes > 1 and (batch_size is None or batch_size % lanes):
            raise UserError(f"batch_size={batch_size} is not a multiple of data.lanes={lanes}: change one of them")
        self.seed = seed
        self.window = window
        self.lanes = lanes
        self.lane_share = (batch_size or 1) // lanes if lanes > 1 else 1
        self._sizes = sizes
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._lanes = _deal(sizes, filled, lanes)
        self._epoch = lru_cache(maxsize=max(2, 2 * lanes))(self._make_epoch)

    def __len__(self) -> int:
        """Samples in an epoch over all lanes."""
        return int(self._starts[-1])

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, samples) at positions of the stream, int64, any shape and order."""
        positions = np.asarray(positions, np.int64)
        flat = positions.reshape(-1)
        lanes, places = self._lane_of(flat)
        epochs, samples = np.empty_like(flat), np.empty_like(flat)
        for lane in np.unique(lanes):
            here = np.flatnonzero(lanes == lane)
            epochs[here], samples[here] = self._at_lane(int(lane), places[here])
        return epochs.reshape(positions.shape), samples.reshape(positions.shape)

    def coming_shards(self, position: int, count: int) -> list[int]:
        """The next `count` shards that the stream reads from `position` on, in order: what staging fetches ahead.

        A window is read all over at once, so that its shards count from its first position on.
        """
        lane, place = (int(values[0]) for values in self._lane_of(np.array([position])))
        epoch, offset = divmod(place, int(self._sizes[self._lanes[lane]].sum()))
        order = self._epoch(lane, epoch)
        first = (int(np.searchsorted(order.ends, offset, side="right")) - 1) // self.window * self.window
        coming: dict[int, None] = {}
        while len(coming) < min(count, len(order.shards)):
            coming |= dict.fromkeys(order.shards[first : first + count].tolist())
            epoch, first = epoch + 1, 0
            order = self._epoch(lane, epoch)
        return list(coming)[:count]

    def _lane_of(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lane of each position, and its place in the lane's own stream."""
        if self.lanes == 1:
            return np.zeros_like(positions), positions
        blocks, inside = np.divmod(positions, self.lane_share)
        steps, lanes = np.divmod(blocks, self.lanes)
        return lanes, steps * self.lane_share + inside

    def _at_lane(self, lane: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        epochs, offsets = np.divmod(places, int(self._sizes[self._lanes[lane]].sum()))
        samples = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = np.flatnonzero(epochs == epoch)
            samples[here] = self._at_epoch(lane, int(epoch), offsets[here])
        return epochs, samples

    def _at_epoch(self, lane: int, epoch: int, offsets: np.ndarray) -> np.ndarray:
        """Samples at offsets into one epoch of a lane."""
        order = self._epoch(lane, epoch)
        windows = (np.searchsorted(order.ends, offsets, side="right") - 1) // self.window
        starts = order.ends[windows * self.window]
        ends = order.ends[np.minimum((windows + 1) * self.window, len(order.shards))]
        keys = counter.key(self.seed, epoch, windows, lane, "window")
        targets = starts + permute(offsets - starts, ends - starts, keys)
        slots = np.searchsorted(order.ends, targets, side="right") - 1
        return self._starts[order.shards[slots]] + targets - order.ends[slots]

    def _make_epoch(self, lane: int, epoch: int) -> Epoch:
        shards = self._lanes[lane]
        hashes = counter.key(self.seed, epoch, shards, lane, "shards")
        shards = shards[np.argsort(hashes, kind="stable")]
        return Epoch(shards, np.concatenate([[0], np.cumsum(self._sizes[shards])]))


def _deal(sizes: np.ndarray, filled: np.ndarray, lanes: int) -> list[np.ndarray]:
    """Shards of each lane: the largest first, each to the lane with the fewest samples so far."""
    if lanes == 1:
        return [filled]
    heap = [(0, lane) for lane in range(lanes)]
    dealt: list[list[int]] = [[] for _ in range(lanes)]
    for shard in filled[np.argsort(-sizes[filled], kind="stable")].tolist():
        samples, lane = heapq.heappop(heap)
        dealt[lane].append(shard)
        heapq.heappush(heap, (samples + int(sizes[shard]), lane))
    return [np.array(sorted(shards), np.int64) for shards in dealt]
