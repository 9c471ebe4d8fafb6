"""Small stand-ins for tests of the trainer: tasks over vectors, a loader without files, real processes.

Owns: nothing of the product. The tasks follow the protocol of pretrain/tasks; their data are a pure function of the
sample, so that any number of ranks sees the same training.
"""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn

from pretrain.data.batch import Batch

WIDTH = 12


class Network(nn.Module):
    """A backbone and projector of a few hundred parameters: matrices, biases, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.LayerNorm(24), nn.Linear(24, 16))
        self.projector = nn.Sequential(nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(self.backbone(x))


class Contrast:
    """NT-Xent over two noisy views of a vector; dropout would make chunks differ, so there is none."""

    separable = False
    transform = None

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.module = Network()
        self.backbone = self.module.backbone

    def embed(self, batch: Batch) -> Tensor:
        noise = torch.stack([batch.starts((WIDTH,), view) for view in (0, 1)], 1)
        views = batch.tensors["images"][:, None] + 0.3 * noise  # [b, 2, WIDTH]
        return self.module(views.flatten(0, 1)).view(len(batch), 2, -1)

    def loss(self, embeddings: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        from pretrain.tasks.nt_xent import nt_xent

        loss, accuracy = nt_xent(embeddings, batch.samples.to(embeddings.device), temperature=0.2)
        return loss, {"accuracy": accuracy}


class Regress(Contrast):
    """A mean over samples."""

    separable = True

    def loss(self, embeddings: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        target = batch.tensors["images"].sum(1)
        error = (embeddings.float().mean((1, 2)) - target).square()
        return error.mean(), {"largest": error.detach().mean()}


class VectorLoader:
    """Loader of random vectors, its own index: `loader[step]` is this rank's part of a global batch."""

    wait_s = 0.0
    fingerprint = ""

    def __init__(
        self, *, num_samples: int = 64, batch_size: int = 16, rank: int = 0, world_size: int = 1, seed: int = 0
    ) -> None:
        self.num_samples, self.batch_size, self.rank, self.world_size = num_samples, batch_size, rank, world_size
        self.seed = seed
        self.vectors = torch.from_numpy(np.random.default_rng(7).normal(size=(num_samples, WIDTH)).astype(np.float32))

    def __getitem__(self, step: int) -> Batch:
        local = self.batch_size // self.world_size
        first = step * self.batch_size + self.rank * local
        positions = torch.arange(first, first + local)
        samples = positions % self.num_samples
        return Batch({"images": self.vectors[samples]}, samples, positions // self.num_samples, positions, self.seed)

    def advice(self) -> str:
        return "read faster"

    def warnings(self) -> list[str]:
        return []

    @property
    def index(self) -> VectorLoader:
        return self

    def keys(self, samples: np.ndarray) -> list[str]:
        return [f"vector_{int(sample):04d}" for sample in samples]

    def close(self) -> None:
        pass


def run_ranks(world_size: int, work: Callable[..., Any], out: Path, *args: Any) -> list[Any]:
    """Run `work(*args)` on so many real processes (gloo, one thread each); return what each returned.

    Results travel through files under `out`. `work` must be importable (a function at the top of a test module).
    """
    out.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        context().Process(target=_rank, args=(rank, world_size, port, work, str(out), args))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)  # generous: the machine may be busy
    errors = [path.read_text() for path in sorted(out.glob("error_*.txt"))]
    stuck = [process for process in processes if process.is_alive()]
    for process in stuck:
        process.kill()
    assert not errors, "\n".join(errors)
    assert not stuck, f"{len(stuck)} ranks hung"
    return [torch.load(out / f"result_{rank}.pt", weights_only=True) for rank in range(world_size)]


def context() -> Any:
    """Processes forked from a server that has imported the slow libraries, once for all tests."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch", "timm", "deepspeed", "tests.standin_run", "pretrain.train"])
    return server


def _rank(rank: int, world_size: int, port: int, work: Callable[..., Any], out: str, args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    try:
        torch.save(work(*args), Path(out) / f"result_{rank}.pt")
    except BaseException:
        (Path(out) / f"error_{rank}.txt").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise
