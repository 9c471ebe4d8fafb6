"""The order of the stream: every sample once an epoch, a function of the position alone, cheap at any size."""

from __future__ import annotations

import resource
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from configs.errors import UserError
from pretrain.data import counter
from pretrain.data.order import Order, permute

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)


@given(SIZES, st.integers(0, 2**32), st.integers(1, 14))
def test_every_epoch_holds_every_sample_once(sizes: list[int], seed: int, window: int) -> None:
    order = Order(np.array(sizes), seed=seed, window=window)
    epochs, samples = order.at(np.arange(3 * len(order)))
    for epoch in range(3):
        part = slice(epoch * len(order), (epoch + 1) * len(order))
        assert sorted(samples[part]) == list(range(sum(sizes)))
        assert (epochs[part] == epoch).all()


@given(SIZES, st.integers(0, 2**32), st.integers(1, 5), st.data())
def test_a_position_alone_decides(sizes: list[int], seed: int, window: int, data: st.DataObject) -> None:
    """Any positions in any order, from a fresh object: what another asked of its object before changes nothing."""
    count = 2 * sum(sizes)
    expected = np.stack(Order(np.array(sizes), seed=seed, window=window).at(np.arange(count)))
    positions = np.array(data.draw(st.lists(st.integers(0, count - 1), max_size=20)), np.int64)
    order = Order(np.array(sizes), seed=seed, window=window)
    assert np.array_equal(np.stack(order.at(positions)), expected[:, positions])


def shards_of(samples: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Shards, of these numbers of samples, that hold the samples."""
    return np.repeat(np.arange(len(sizes)), sizes)[samples]


@settings(max_examples=30)
@given(st.lists(st.integers(1, 30), min_size=4, max_size=12), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_lanes_deal_shards_and_keep_epochs_whole(sizes: list[int], lanes: int, share: int, seed: int) -> None:
    batch = lanes * share
    order = Order(np.array(sizes), seed=seed, window=2, lanes=lanes, batch_size=batch)
    steps = 3 * sum(sizes)
    epochs, samples = order.at(np.arange(steps * batch))
    shards = shards_of(samples, sizes).reshape(steps, lanes, share)
    owner = {int(shard): lane for lane in range(lanes) for shard in np.unique(shards[:, lane])}
    assert len(owner) == len(sizes)
    assert all(len(set(map(int, np.unique(shards[:, lane])))) for lane in range(lanes))
    for lane in range(lanes):
        mine = [shard for shard, lane_of in owner.items() if lane_of == lane]
        assert set(np.unique(shards[:, lane]).tolist()) == set(mine)
        stream = samples.reshape(steps, lanes, share)[:, lane].reshape(-1)
        of_epoch = epochs.reshape(steps, lanes, share)[:, lane].reshape(-1)
        size = sum(sizes[shard] for shard in mine)
        for epoch in range(2):
            assert len(set(stream[of_epoch == epoch].tolist())) == (of_epoch == epoch).sum() == size


def test_lanes_are_balanced() -> None:
    sizes = np.random.default_rng(0).integers(1, 1000, 200)
    order = Order(sizes, seed=0, window=4, lanes=8, batch_size=8)
    loads = [sizes[lane].sum() for lane in order._lanes]
    assert max(loads) - min(loads) < 1000


def test_the_same_parts_make_the_same_batch_at_any_world_size() -> None:
    order = Order(np.array([30, 20, 50]), seed=1, window=2)
    whole = order.at(np.arange(7 * 24, 8 * 24))[1]
    for world_size in (1, 2, 3, 4, 8):
        share = 24 // world_size
        parts = [order.at(np.arange(7 * 24 + r * share, 7 * 24 + (r + 1) * share))[1] for r in range(world_size)]
        assert np.array_equal(np.concatenate(parts), whole)


def test_a_window_reads_its_shards_only() -> None:
    order = Order(np.full(20, 50), seed=5, window=4)
    shards = shards_of(order.at(np.arange(1000))[1], [50] * 20).reshape(5, 200)
    windows = [set(row.tolist()) for row in shards]
    assert all(len(window) == 4 for window in windows)
    assert set.union(*windows) == set(range(20))


def test_coming_shards_are_those_that_come() -> None:
    order = Order(np.full(12, 10), seed=2, window=3)
    for position in (0, 35, 100, 119):
        coming = order.coming_shards(position, 6)
        first = position // 30 * 30
        read = shards_of(order.at(np.arange(first, first + 60))[1], [10] * 12)
        assert set(read.tolist()) <= set(coming)


def test_coming_shards_of_a_small_set_are_all() -> None:
    assert sorted(Order(np.array([3, 4]), seed=0, window=16).coming_shards(5, 32)) == [0, 1]


def test_small_permutations_are_uniform() -> None:
    keys = counter.key(0, 0, np.arange(24_000), 0, "test")
    rows = [permute(np.full(len(keys), value), np.full(len(keys), 4), keys) for value in range(4)]
    counts = Counter(zip(*(row.tolist() for row in rows)))
    assert len(counts) == 24
    assert stats.chisquare(list(counts.values())).pvalue > 1e-4


def test_large_permutations_look_random() -> None:
    """No correlation between place and value, nor between neighbours; as many fixed points as chance has."""
    size = 100_003
    values = permute(np.arange(size), np.full(size, size), np.full(size, 77, np.uint64))
    assert np.array_equal(np.sort(values), np.arange(size))
    assert abs(np.corrcoef(values, np.arange(size))[0, 1]) < 0.02
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 0.02
    assert (values == np.arange(size)).sum() < 10


def test_a_billion_samples_are_planned_in_milliseconds() -> None:
    sizes = np.full(130_000, 10_000)
    order = Order(sizes, seed=0, window=16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    order.at(np.arange(256))  # the shards of the epoch are permuted once
    begin = time.process_time()
    for step in range(100):
        order.at(np.arange(256) + step * 12_345_678)
    assert (time.process_time() - begin) / 100 < 0.02
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 50


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(UserError, match="no samples"):
        Order(np.array([0, 0]), seed=0, window=1)
    with pytest.raises(UserError, match=r"data\.lanes=3 is more than the 2 shards"):
        Order(np.array([5, 5]), seed=0, window=1, lanes=3, batch_size=6)
    with pytest.raises(UserError, match="not a multiple"):
        Order(np.array([5, 5]), seed=0, window=1, lanes=2, batch_size=7)
