"""NT-Xent of one rank among many: time against the full matrix on every rank, and memory against the batch.

python tests/benchmarks/contrastive.py [--world-size 64] [--batch 8192] [--dim 256]

A fake process group stands for the other ranks: collectives return at once, shapes are those of the real run.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from pretrain.tasks.nt_xent import nt_xent
from pretrain.timing import Clock, peak_bytes
from tests.plain.loss import nt_xent as full_nt_xent


def own_rows(b: int, dim: int) -> None:
    embeddings = torch.randn(b, 2, dim, requires_grad=True)
    nt_xent(embeddings)[0].backward()


def full_matrix(batch: int, dim: int) -> None:
    views = torch.randn(2, batch, dim, requires_grad=True)
    full_nt_xent(views[0], views[1], 0.1).backward()


def cpu_seconds(call: object, repeats: int) -> float:
    """Least processor time of a few calls: other processes of a busy machine do not enter."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()  # type: ignore[operator]
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--world-size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8192, help="global batch in images")
    parser.add_argument("--dim", type=int, default=256)
    args = parser.parse_args()
    torch.set_num_threads(1)
    full = cpu_seconds(lambda: full_matrix(args.batch, args.dim), 1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=args.world_size)
    own = cpu_seconds(lambda: own_rows(args.batch // args.world_size, args.dim), 5)
    print(f"batch {args.batch}, {args.world_size} ranks, d {args.dim}, one thread: own rows {own:.3f} s, full matrix "
          f"{full:.3f} s, {full / own:.0f} times")  # fmt: skip
    dist.destroy_process_group()
    for world_size in (args.world_size, 1024):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
        for batch in (1024, 4096, 16384, 65536):
            if batch < world_size:
                continue

            def step(clock: Clock, b: int = batch // world_size) -> float:
                own_rows(b, args.dim)
                return 0.0

            mib = peak_bytes(step, torch.device("cpu")) / 2**20
            print(f"{world_size} ranks, batch {batch}: {mib:.1f} MiB at once, {1024 * mib / batch:.1f} KiB per image")
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
