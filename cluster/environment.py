"""The environment of a job's processes.

Owns: the variables that must be set before Python starts (threads, allocator, network), and those that tell each rank
its place. Pure functions from plain values to dictionaries, so that they are tested without processes.
"""

from __future__ import annotations

import os
from pathlib import Path

from configs.cluster import Cluster

# Ports for the rendezvous where cluster.port does not name one; below Linux's ephemeral ports (32768 and up).
_FIRST_PORT, _NUM_PORTS = 15_000, 15_000

# A rank whose peer died must fail and not wait in NCCL for ever.
_GPU = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
# Large tensors in huge pages: few page faults. A C library that keeps freed memory is slower, and its heap grows
# (docs/benchmarks.md).
_CPU = {"THP_MEM_ALLOC_ENABLE": "1"}


def port_at(cluster: Cluster, job_id: int, generation: int) -> int:
    """Rendezvous port of one life of a job; the next life gets another one, since the old one may still be held."""
    if cluster.port is not None:
        return cluster.port
    return _FIRST_PORT + (job_id * 31 + generation) % _NUM_PORTS


def before_python(
    cluster: Cluster,
    *,
    code: Path,
    cores: int,
    processes: int,
    gpus: int,
    local: bool,
    commit: str,
    python_path: str = "",
) -> dict[str, str]:
    """Variables for all processes of a job on a node.

    Args:
        code: the snapshot that is imported.
        cores: CPU cores that the job has on the node.
        processes: its processes there.
        gpus: its GPUs there.
        local: whether all processes run on this machine.
        commit: of the code, for the results.
        python_path: the launcher's own PYTHONPATH, searched after the snapshot.
    """
    threads = str(max(1, cores // processes))
    variables = _GPU if gpus else _CPU
    variables = variables | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(code), python_path])),
        "PYTHONUNBUFFERED": "1",
        "SUBMITIT_LOG_LEVEL": "CRITICAL",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "AKORN_COMMIT": commit,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TORCHINDUCTOR_CACHE_DIR": str(Path.home() / ".cache" / "akorn" / "inductor"),
    }
    if processes > cores:
        variables["OMP_WAIT_POLICY"] = "PASSIVE"
    if cluster.interface is not None:
        variables |= {"NCCL_SOCKET_IFNAME": cluster.interface, "GLOO_SOCKET_IFNAME": cluster.interface}
    elif local:
        variables |= {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
    return variables | cluster.env


def of_rank(
    *, rank: int, local_rank: int, world_size: int, processes: int, cores: int | None, address: str, port: int,
    generation: int,
) -> dict[str, str]:  # fmt: skip
    """Variables that tell one process its place, named as torchrun names them, and its cores where they are its own."""
    own = {} if cores is None else {"AKORN_CORES": str(cores)}
    return own | {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "AKORN_GENERATION": str(generation),
    }
