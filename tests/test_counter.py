"""The counter-based generator: one sequence of bits in Python, numpy and torch, with the statistics of randomness."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pretrain.data import counter

BITS = st.integers(0, (1 << 64) - 1)


def test_mixing_is_splitmix64() -> None:
    """Reference values of the published generator from seed 1234567 (Vigna's splitmix64.c, quoted by Rosetta Code)."""
    state, values = 1234567, []
    for _ in range(3):
        state = (state + counter.GAMMA) & counter.MASK
        values.append(counter.mix_int(state))
    assert values == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.lists(BITS, min_size=1, max_size=8))
def test_bits_are_equal_in_python_numpy_and_torch(values: list[int]) -> None:
    expected = [counter.mix_int(value) for value in values]
    assert counter.mix(np.array(values, np.uint64)).tolist() == expected
    tensor = counter.mix_tensor(torch.tensor([counter.signed(value) for value in values]))
    assert [value & counter.MASK for value in tensor.tolist()] == expected


@given(BITS, st.integers(0, 10**6), st.integers(0, 10**10), st.integers(0, 7), st.sampled_from(["crop", "start"]))
def test_keys_are_equal_one_by_one_and_vectorised(seed: int, epoch: int, sample: int, view: int, purpose: str) -> None:
    samples = np.array([[sample], [sample + 1]])
    keys = counter.key(seed, epoch, samples, np.array([view, view + 1]), purpose)
    assert keys.shape == (2, 2)
    for row, column in np.ndindex(2, 2):
        assert int(keys[row, column]) == counter.key_int(seed, epoch, sample + row, view + column, purpose)


def test_keys_differ_in_every_argument() -> None:
    arguments = itertools.product((0, 1), (0, 1), (0, 1), (0, 1), ("crop", "start"))
    assert len({counter.key_int(*chosen) for chosen in arguments}) == 32


def test_uniform_numbers_are_uniform_and_independent() -> None:
    draws = counter.uniform(counter.key(3, 0, np.arange(20_000), 0, "test"), 4)
    assert draws.min() >= 0
    assert draws.max() < 1
    for column in draws.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    correlation = np.corrcoef(np.concatenate([draws[:-1], draws[1:]], 1).T)
    assert np.abs(correlation - np.eye(8)).max() < 0.03


def test_normal_numbers_are_normal() -> None:
    values = counter.normal(torch.arange(64), (50, 17)).double()
    assert values.shape == (64, 50, 17)
    assert stats.kstest(values.flatten().numpy()[::7], "norm").pvalue > 1e-3
    assert abs(stats.kurtosis(values.flatten().numpy())) < 0.1
    halves = values.flatten(1)
    assert abs(np.corrcoef(halves[:, :425].flatten(), halves[:, 425:].flatten())[0, 1]) < 0.02


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(-(1 << 63), (1 << 63) - 1), min_size=1, max_size=6), st.integers(1, 300))
def test_normal_numbers_depend_on_their_key_alone(keys: list[int], count: int) -> None:
    """Not on the batch that they are drawn in, nor on its blocks."""
    together = counter.normal(torch.tensor(keys), (count,))
    alone = torch.cat([counter.normal(torch.tensor([key]), (count,)) for key in keys])
    assert torch.equal(together, alone)


def test_normal_numbers_in_large_batches_equal_those_alone() -> None:
    keys, shape = torch.arange(40), (64, 128)
    assert torch.equal(counter.normal(keys, shape)[37], counter.normal(keys[37:38], shape)[0])
