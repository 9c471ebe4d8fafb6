"""The plan of a job in numbers: processes, batches, steps, epochs; computed without torch.

Owns: how many samples a shard set has (read from its index), what a run comes to, and the lines that say so.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from cluster.locate import shown
from cluster.resources import Resources
from configs import PretrainConfig, UserError


@dataclass(frozen=True)
class Plan:
    """What a pretraining comes to."""

    world_size: int
    batch_per_process: int
    micro_batches: int
    samples: int | None  # None: the shards have no index yet
    steps: int | None
    epochs: float | None


def plan_of(config: PretrainConfig, resources: Resources) -> Plan:
    """Work out the plan.

    Raises:
        UserError: the global batch does not divide; names the world sizes that work.
    """
    world_size = resources.world_size
    if config.batch_size % world_size:
        fitting = [size for size in range(1, config.batch_size + 1) if config.batch_size % size == 0]
        near = sorted(sorted(fitting, key=lambda size: (abs(size - world_size), size))[:4])
        below = config.batch_size // world_size * world_size
        raise UserError(
            f"batch_size={config.batch_size} does not divide over {world_size} processes; "
            f"use {', '.join(map(str, near))} processes, or batch_size={below or world_size}"
        )
    per_process = config.batch_size // world_size
    samples = count_samples(config.data.shards)
    steps, epochs = length_of(config), config.epochs
    if samples and epochs is None and steps is not None:
        epochs = steps * config.batch_size / samples
    micro_batches = math.ceil(per_process / (config.compute.micro_batch or per_process))
    return Plan(world_size, per_process, micro_batches, samples, steps, epochs)


def length_of(config: PretrainConfig) -> int | None:
    """Steps of a run, or None where they depend on the number of samples and the shards have no index yet."""
    samples = count_samples(config.data.shards)
    return config.steps if samples is None else config.num_steps(samples)


def count_samples(shards: str | tuple[str, ...]) -> int | None:
    """Samples of a shard set by the index.json beside its tars, or None where there is none."""
    if not isinstance(shards, str):
        return None
    try:
        return int(json.loads((Path(shards) / "index.json").read_text(encoding="utf-8"))["samples"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def describe_resources(resources: Resources) -> str:
    """One line: where, how many nodes, processes, GPUs and cores."""
    where = "SLURM" if resources.executor == "slurm" else "this machine"
    partition = f", partition {resources.cluster.partition}" if resources.cluster.partition else ""
    nodes = f"{resources.nodes} node{'s' * (resources.nodes > 1)} x " if resources.executor == "slurm" else ""
    kind = f" {resources.cluster.gpu_type}" if resources.cluster.gpu_type else ""
    gpus = f", {resources.gpus}{kind} GPU{'s' * (resources.gpus > 1)} per node" if resources.gpus else ", CPU"
    cores = f", {resources.cores} core{'s' * (resources.cores > 1)} per process" if resources.cores else ""
    processes = f"{resources.processes} process{'es' * (resources.processes > 1)}"
    return f"{where}{partition}: {nodes}{processes}{gpus}{cores}"


def describe(config: PretrainConfig, home: Path, plan: Plan) -> list[tuple[str, str]]:
    """Label and text of each line of the plan."""
    chunks = f" in {plan.micro_batches} micro-batches" if plan.micro_batches > 1 else ""
    samples = "samples counted when the job starts" if plan.samples is None else f"{plan.samples:,} samples"
    steps = "counted when the job starts" if plan.steps is None else f"{plan.steps:,}"
    epochs = "" if plan.epochs is None else f" = {plan.epochs:.4g} epochs"
    shards = config.data.shards if isinstance(config.data.shards, str) else f"{len(config.data.shards)} shards"
    return [
        ("run", shown(home)),
        ("model", config.model.name),
        ("data", f"{shown(shards) if isinstance(config.data.shards, str) else shards} ({samples})"),
        ("batch", f"{config.batch_size} = {plan.world_size} x {plan.batch_per_process}{chunks}"),
        ("steps", f"{steps}{epochs}"),
        ("precision", f"{config.compute.precision}, ZeRO {config.compute.zero_stage}"),
        ("checkpoint", f"every {config.checkpoints.save_every} steps, last {config.checkpoints.keep_last} kept"),
    ]
