"""The processes of a run: how they find each other, and the few things they tell one another outside the training.

Owns: joining and leaving the process group, this process's place in it, and small messages between ranks on the CPU.
Tensors of the training travel through DeepSpeed and the loss; messages use a gloo group of their own, so that they
never wait for the device.
"""

from __future__ import annotations

import json
import os
import resource
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from configs.errors import UserError

TIMEOUT_S = 1800.0  # a peer may compile or wait for a shard for this long; the watchdog is the finer net
MOST_RANKS = 1 << 20
BARRIER_S = 7 * 86_400.0  # longer than anything that one rank does for all; a dead peer is noticed at once
MOST_FILES = 1 << 16


@dataclass(frozen=True)
class Ranks:
    """This process's place among those of the run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    messages: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """True on the one rank that writes files."""
        return self.rank == 0


def join(timeout_s: float = TIMEOUT_S) -> Ranks:
    """Join the run's processes, as RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT say; alone without them.

    Collective. On GPUs this sets the current device to LOCAL_RANK (modulo the visible ones).
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.setdefault("LOCAL_RANK", str(rank)))  # DeepSpeed insists on finding it
    device = own_device()
    _allow_files()
    # DeepSpeed calls collectives by names that torch has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # A store in memory: a lone process needs no port and no network.
        store = dist.HashStore() if world_size == 1 else None
        place: dict[str, Any] = {} if store is None else {"store": store, "rank": 0, "world_size": 1}
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), **place)
        if device.type == "cuda" and world_size > 1:
            # NCCL connects at its first use: here, where what it says is heard, and not where DeepSpeed is silenced.
            dist.all_reduce(torch.zeros(1, device=device))
    messages = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    assert isinstance(messages, dist.ProcessGroup)  # every rank is a member
    return Ranks(rank, world_size, local_rank, device, messages)


def leave() -> None:
    """Leave the process group; does nothing where there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()


def own_device(wanted: str | None = None) -> torch.device:
    """The device of this process: the one wanted by name, else the CPU, or where there are GPUs ("cuda" too) the one
    that LOCAL_RANK says, modulo those that are visible; it becomes the current one.

    Raises:
        UserError: there is no such device.
    """
    if wanted not in (None, "cuda") or not torch.cuda.is_available():
        try:
            return torch.empty(0, device=wanted or "cpu").device
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device={wanted} cannot be used here: {str(error).splitlines()[0]}") from None
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    # DeepSpeed takes LOCAL_RANK for the device's number, which it is not where SLURM shows each process its own GPU.
    os.environ["LOCAL_RANK"] = str(device.index)
    return device


def _allow_files() -> None:
    """Raise the limit of open files: gloo holds up to four connections to each peer, the usual 1,024 end at 250."""
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(allowed, min(most, MOST_FILES)), most))


def check_divides(batch_size: int, world_size: int) -> None:
    """Raise a `UserError` naming the world sizes that work when a global batch does not divide among the ranks."""
    if batch_size % world_size:
        fitting = [n for n in range(1, 2 * world_size + 1) if batch_size % n == 0]
        raise UserError(
            f"batch_size={batch_size} does not divide among {world_size} processes; "
            f"use {', '.join(map(str, fitting))} processes or another batch size"
        )


def broadcast_json(value: Any, ranks: Ranks) -> Any:
    """Return rank 0's value on every rank (collective). The value is what JSON can hold; nothing is unpickled."""
    if ranks.world_size == 1:
        return json.loads(json.dumps(value))
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8) if ranks.first else None
    size = torch.tensor([0 if data is None else len(data)])
    dist.broadcast(size, 0, group=ranks.messages)
    buffer = data if data is not None else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(buffer, 0, group=ranks.messages)
    return json.loads(buffer.numpy().tobytes().decode())


def once(work: Callable[[], None], ranks: Ranks) -> None:
    """Do something on rank 0 for all; a `UserError` that comes of it is raised on every rank (collective)."""
    refusal = None
    if ranks.first:
        try:
            work()
        except UserError as error:
            refusal = str(error)
    refusal = broadcast_json(refusal, ranks)
    if refusal is not None:
        raise UserError(refusal)


def gather_int64(values: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Return the int64 vectors of all ranks one after the other, on the CPU (collective). Sizes are equal."""
    values = values.cpu().contiguous()
    if ranks.world_size == 1:
        return values
    whole = [torch.empty_like(values) for _ in range(ranks.world_size)]
    dist.all_gather(whole, values, group=ranks.messages)
    return torch.cat(whole)


def mean_over_ranks(values: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Return the mean of a CPU tensor over the ranks, in float64 (collective)."""
    values = values.double()
    if ranks.world_size > 1:
        dist.all_reduce(values, group=ranks.messages)
    return values / ranks.world_size


def largest_over_ranks(seconds: Sequence[float], ranks: Ranks) -> Callable[[], list[tuple[float, int]]]:
    """Begin to find the largest over the ranks of each of some times >= 0, and whose it is (collective); the function
    that is returned waits for the answer. Time, in microseconds, and rank travel as one number."""
    packed = torch.tensor([round(each * 1e6) * MOST_RANKS + ranks.rank for each in seconds])
    work = None
    if ranks.world_size > 1:
        work = dist.all_reduce(packed, op=dist.ReduceOp.MAX, group=ranks.messages, async_op=True)

    def found() -> list[tuple[float, int]]:
        if work is not None:
            work.wait()
        return [(number // MOST_RANKS / 1e6, number % MOST_RANKS) for number in packed.tolist()]

    return found


def barrier(ranks: Ranks, *, alive: Callable[[], None] = lambda: None) -> None:
    """Wait for every rank, however long that takes (collective); `alive` is called all the while."""
    if ranks.world_size == 1:
        return
    assert ranks.messages is not None
    options = dist.AllreduceOptions()
    options.timeout = timedelta(seconds=BARRIER_S)
    work = ranks.messages.allreduce([torch.zeros(1)], options)
    while not work.is_completed():
        alive()
        time.sleep(0.01)
    work.wait()
