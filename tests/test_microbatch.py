"""Chunks: how a batch is cut, exact gradients of a real AKOrN with random starts, memory that a chunk bounds."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.data.batch import Batch
from pretrain.microbatch import backward, chunks
from tests.standin_run import settings


class Alone:
    """What microbatch asks of an engine, on one process without DeepSpeed (which tests/test_engine.py has)."""

    class ranks:  # noqa: N801
        world_size = 1

    def __init__(self, task: Any) -> None:
        self.task = task

    def embed(self, batch: Batch) -> Tensor:
        return self.task.embed(batch)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()


def views(size: int) -> Batch:
    """A batch of random pixels, two views of each image."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (size, 2, 3, 32, 32), dtype=torch.uint8, generator=generator)
    numbers = torch.arange(size)
    return Batch({"images": images}, numbers, numbers * 0, numbers, 0)


def akorn(steps: int = 2) -> Any:
    from pretrain.tasks import make_task

    torch.manual_seed(0)
    return make_task(settings(model={"name": "akorn_nano_patch4_32", "args": {"num_steps": steps}}, views={"size": 32}))


@pytest.mark.parametrize(
    ("size", "most", "expected"), [(10, None, [10]), (10, 4, [4, 4, 2]), (9, 8, [5, 4]), (3, 9, [3])]
)
def test_chunks(size: int, most: int | None, expected: list[int]) -> None:
    cut = chunks(size, most)
    assert [part.stop - part.start for part in cut] == expected
    assert (cut[0].start, cut[-1].stop) == (0, size)


def gradients(task: Any, batch: Batch, micro_batch: int | None) -> tuple[float, list[Tensor]]:
    engine: Any = Alone(task)
    task.module.zero_grad()
    record = backward(engine, task, batch, micro_batch, seed=3, describe=True)
    assert {"loss", "accuracy", "alignment", "uniformity", "effective_rank"} <= record.keys()
    return float(record["loss"]), [p.grad.clone() for p in task.module.parameters() if p.grad is not None]


@pytest.mark.parametrize("size", [24, pytest.param(256, marks=pytest.mark.slow)])
def test_chunks_of_an_akorn_with_random_starts_give_the_gradients_of_the_whole(size: int) -> None:
    task, batch = akorn(), views(size)
    whole, expected = gradients(task, batch, None)
    for micro_batch in (size // 2, 7):
        loss, found = gradients(task, batch, micro_batch)
        assert loss == pytest.approx(whole, rel=1e-6)
        for mine, theirs in zip(found, expected):
            assert (mine - theirs).norm() <= 1e-4 * theirs.norm() + 1e-7


@pytest.mark.slow
def test_batch_of_4096_fits_into_2_gib(tmp_path: Path) -> None:
    """Peak memory of this process, which has held nothing larger before in a fresh interpreter."""
    import subprocess
    import sys

    code = "from tests.test_microbatch import peak_of; print(peak_of(4096, 64))"
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True)
    assert float(done.stdout.split()[-1]) < 2.0


def peak_of(size: int, micro_batch: int) -> float:
    """GiB that a step of this batch needs beyond what the process had after a step of one chunk's model."""
    task = akorn()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gradients(task, views(size), micro_batch)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
