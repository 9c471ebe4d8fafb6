"""Memory of a training before it runs: parameters, states and activations from the configuration alone.

Owns: a rough count for this project's own attention models (docs/slurm.md says how rough), and the memory of GPUs by
the names that clusters give them. Other models have no estimate.
"""

from __future__ import annotations

import re

from cluster.plan import Plan
from cluster.resources import Resources
from configs import PretrainConfig

# GiB that a job can use, by the (lower-case) name in SLURM's GPU type.
GPU_GIB = {
    "h200": 139,
    "h100": 78,
    "a100_80gb": 78,
    "a100-80gb": 78,
    "a100": 39,
    "b200": 178,
    "l40s": 44,
    "a40": 44,
    "a6000": 47,
    "v100": 31,
    "rtx3090": 23,
    "rtx4090": 23,
    "a10": 22,
    "t4": 15,
}
# Channels C, layers L, and steps T of each size (docs/models.md).
_SIZES = {
    "tiny": (256, 1, 8),
    "small": (384, 2, 8),
    "base": (768, 3, 8),
    "large": (1024, 4, 8),
    "clevrtex_l1": (256, 1, 8),
    "clevrtex_l2": (256, 2, 8),
    "clevrtex_large": (512, 2, 8),
    "nano": (128, 1, 8),
    "nano_l2": (128, 2, 3),
}
_NAME = re.compile(r"(?:akorn|itrsa)_(\w+?)_patch(\d+)_(\d+)")
_GIB = 2**30


def shape_of(config: PretrainConfig) -> tuple[int, int, int, int] | None:
    """Channels, layers, steps and tokens of one of our attention models; None for any other model."""
    match = _NAME.match(config.model.name)
    if match is None or match.group(1) not in _SIZES:
        return None
    channels, layers, steps = (
        int(value) if isinstance(value := config.model.args.get(key, default), int) else default
        for key, default in zip(("embed_dim", "depth", "num_steps"), _SIZES[match.group(1)])
    )
    patch, size = int(match.group(2)), config.views.size if config.views else int(match.group(3))
    return channels, layers, steps, (size // patch) ** 2


def parameters(config: PretrainConfig) -> int | None:
    """Rough number of trained parameters: coupling 4 C^2 and readout 4 C^2 a layer, and what is there once."""
    shape = shape_of(config)
    if shape is None:
        return None
    channels, layers, _, _ = shape
    return (8 * layers + 3) * channels**2


def checkpoint_gib(config: PretrainConfig) -> float | None:
    """GiB of one checkpoint: weights, average, two moments, in fp32."""
    count = parameters(config)
    return None if count is None else 4 * 4 * count / _GIB


def estimate_gib(config: PretrainConfig, plan: Plan, resources: Resources) -> float | None:
    """GiB per process of a training step: states, and what the backward pass keeps of each step of each image."""
    shape, count = shape_of(config), parameters(config)
    if shape is None or count is None:
        return None
    channels, layers, steps, tokens = shape
    shared = resources.world_size if config.compute.zero_stage else 1
    states = 4 * count * (3 + 2 / shared)
    views = 2 * min(plan.batch_per_process, config.compute.micro_batch or plan.batch_per_process)
    width = 2 if config.compute.precision == "bf16" else 4
    # Kept per step and token: q, k, v, attention's output, force, and the state before and after, some in fp32.
    kept = (1 if config.compute.recompute else steps) * layers * tokens * channels * (6 * width + 3 * 4)
    return (states + views * kept) / _GIB
