"""Random numbers that are a pure function of what they are for: a counter-based SplitMix64.

Owns: keys (seed, epoch, sample, view, purpose -> 64 bits) and the uniform and normal numbers drawn from a key. The
integers are equal in Python, numpy (host) and torch (any device), so that a sample's randomness depends on no rank,
worker, device, chunk or order of computation. Source of the mixing function: Steele, Lea, Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014 (SplitMix64, constants of its variant 13).

Shapes: B keys.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pretrain.fusing import fused_on_gpu

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SHIFTS = (30, 27, 31)

# Rows of normal numbers are drawn in blocks of about this many elements, so that temporaries stay in a core's cache.
BLOCK = 1 << 16


@lru_cache(maxsize=256)
def code(purpose: str) -> int:
    """64 bits that stand for a purpose: crop, colour, start, ..."""
    return int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")


def mix_int(value: int) -> int:
    """SplitMix64's output function on one Python integer."""
    value &= MASK
    value = ((value ^ (value >> SHIFTS[0])) * MULTIPLIERS[0]) & MASK
    value = ((value ^ (value >> SHIFTS[1])) * MULTIPLIERS[1]) & MASK
    return value ^ (value >> SHIFTS[2])


def mix(values: np.ndarray) -> np.ndarray:
    """The same on uint64 arrays; returns a new array."""
    values = values ^ (values >> np.uint64(SHIFTS[0]))
    values *= np.uint64(MULTIPLIERS[0])
    values ^= values >> np.uint64(SHIFTS[1])
    values *= np.uint64(MULTIPLIERS[1])
    values ^= values >> np.uint64(SHIFTS[2])
    return values


def mix_tensor(values: Tensor) -> Tensor:
    """The same on int64 tensors, bits read as unsigned; in place."""
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, None)):
        shifted = values >> shift  # arithmetic: the mask removes the copies of the sign
        values ^= shifted.bitwise_and_((1 << (64 - shift)) - 1)
        if multiplier is not None:
            values *= signed(multiplier)
    return values


def signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value &= MASK
    return value - (1 << 64) if value >> 63 else value


def key_int(seed: int, epoch: int, sample: int, view: int, purpose: str) -> int:
    """`key` for one sample, in Python integers."""
    state = mix_int(seed + GAMMA) ^ code(purpose)
    for value in (epoch, sample, view):
        state = mix_int(state + GAMMA + value)
    return state


def key(
    seed: int, epoch: int | np.ndarray, sample: int | np.ndarray, view: int | np.ndarray, purpose: str
) -> np.ndarray:
    """Keys for samples of the stream, uint64, in the broadcast shape of `epoch`, `sample` and `view` (non-negative)."""
    state = np.asarray([mix_int(seed + GAMMA) ^ code(purpose)], np.uint64)
    for values in (epoch, sample, view):
        state = mix(state + np.uint64(GAMMA) + np.asarray(values).astype(np.uint64))
    return state.reshape(np.broadcast_shapes(np.shape(epoch), np.shape(sample), np.shape(view)))


def uniform(keys: np.ndarray, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1), multiples of 2^-53: uint64 [...] -> float64 [..., count]."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GAMMA)
    bits = mix(np.asarray(keys, np.uint64)[..., None] + steps)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers for each key: int64 [B] -> float32 [B, *shape] on the device of the keys.

    Box-Muller on 24 bits each for radius and angle. The bits are equal on all devices, the values up to the rounding of
    log, sin and cos; |value| < 5.9.
    """
    count = math.prod(shape)
    # 64-bit numbers that torch.compile would take for indices, and hold in 32 bits, inside a fused function.
    steps = torch.arange(1, (count + 1) // 2 + 1, device=keys.device) * signed(GAMMA)
    if keys.device.type != "cpu":
        return _normal(keys, steps, count).view(len(keys), *shape)
    rows = max(1, BLOCK // max(1, count))
    values = torch.empty(len(keys), count)
    for first in range(0, len(keys), rows):
        values[first : first + rows] = _normal(keys[first : first + rows], steps, count)
    return values.view(len(keys), *shape)


@fused_on_gpu
def _normal(keys: Tensor, steps: Tensor, count: int) -> Tensor:
    """int64 keys [B] and the steps of their counters [ceil(count / 2)] -> normal numbers [B, count]."""
    bits = mix_tensor(keys[:, None] + steps)
    angle = (bits & 0xFFFFFF).to(torch.float32).mul_(2 * math.pi * 2.0**-24)
    radius = bits.bitwise_right_shift_(40).bitwise_and_(0xFFFFFF).to(torch.float32)
    radius = radius.add_(0.5).mul_(2.0**-24).log_().mul_(-2).sqrt_()
    return torch.cat([radius * angle.cos(), radius * angle.sin_()], 1)[:, :count]
