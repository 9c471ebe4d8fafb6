"""What a job runs on: the executor, nodes, processes, GPUs and cores, made definite from `cluster:` and what is here.

Owns: the step from "auto" and "default" in the configuration to numbers.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster import slurm
from configs import UserError
from configs.cluster import Cluster


@dataclass(frozen=True)
class Resources:
    """Definite resources of one job. `cluster` carries what is passed on as it is."""

    executor: Literal["slurm", "local"]
    nodes: int
    processes: int  # per node
    gpus: int  # per node
    cores: int | None  # CPU cores per process; None: SLURM's default
    cluster: Cluster

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes


def resolve(cluster: Cluster) -> Resources:
    """Make the resources definite.

    Raises:
        UserError: they cannot be had here; says what can.
    """
    executor = cluster.executor
    if executor == "auto":
        executor = "slurm" if slurm.available() else "local"
    if executor == "local":
        return _local(cluster)
    gpus = cluster.gpus if cluster.gpus is not None else _partition_gpus(cluster)
    processes = cluster.processes or max(1, gpus)
    return Resources("slurm", cluster.nodes, processes, gpus, cluster.cpus_per_process, cluster)


def _local(cluster: Cluster) -> Resources:
    here = local_gpus()
    gpus = len(here) if cluster.gpus is None else cluster.gpus
    if cluster.nodes > 1:
        fitting = "cluster.nodes=1" + (f" cluster.gpus={len(here)}" if gpus > len(here) else "")
        raise UserError(f"cluster.nodes={cluster.nodes} needs SLURM, which is not here; on this machine: {fitting}")
    if gpus > len(here):
        raise UserError(f"cluster.gpus={gpus}, but this machine shows {len(here)}; use cluster.gpus={len(here)}")
    processes = cluster.processes or max(1, gpus)
    cores = cluster.cpus_per_process or max(1, len(os.sched_getaffinity(0)) // processes)
    return Resources("local", 1, processes, gpus, cores, cluster)


def _partition_gpus(cluster: Cluster) -> int:
    """GPUs of a node of the partition that would be used, of the wanted type."""
    found = slurm.partitions(cluster.partition)
    if not found:
        known = ", ".join(slurm.names_of_partitions())
        wanted = f"cluster.partition={cluster.partition}" if cluster.partition else "a default partition"
        raise UserError(f"SLURM has no {wanted}; set cluster.partition to one of: {known}")
    gpus = found[0].gpus
    return max(gpus.values(), default=0) if cluster.gpu_type is None else gpus.get(cluster.gpu_type, 0)


def local_gpus() -> list[str]:
    """Names under which this machine's GPUs are visible (CUDA_VISIBLE_DEVICES, else 0, 1, ...), without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    driver = Path("/proc/driver/nvidia/gpus")
    if driver.is_dir():
        return [str(index) for index, _ in enumerate(driver.iterdir())]
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(index) for index, line in enumerate(listing.splitlines()) if line.startswith("GPU ")]
