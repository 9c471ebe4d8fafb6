"""A process that loads: writes a line for each step, so that tests can kill it and compare what it saw.

    python tests/loader_process.py SHARDS OUT RANK WORLD_SIZE WORKERS START STOP

Also the transforms that tests hand to loader workers, which must find them by import.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from configs.schema import Data, Loading, Views
from pretrain.data.fetch import Work
from pretrain.data.loader import Loader
from pretrain.data.views import SimclrTransform

BATCH_SIZE = 12
SEED = 11
SIMCLR = SimclrTransform(Views(size=16), SEED)


@dataclass(frozen=True)
class Stalling:
    """Never comes back from one sample."""

    sample: int

    def draws(self, epochs: np.ndarray, samples: np.ndarray) -> list[int]:
        return list(samples.tolist())

    def __call__(self, parts: Mapping[str, Any], sample: int) -> Work:
        return partial(self.work, sample)

    def work(self, sample: int) -> dict[str, np.ndarray]:
        while sample == self.sample:
            time.sleep(0.1)
        return {"number": np.array(sample)}


class Failing(Stalling):
    """Has a defect that one sample shows."""

    def work(self, sample: int) -> dict[str, np.ndarray]:
        return {"number": np.array(sample // (sample - self.sample))}


def line(loader: Loader, step: int) -> dict[str, Any]:
    """What a rank saw at a step: samples, epochs, and a checksum of each sample's views."""
    batch = loader[step]
    images = [zlib.crc32(row.numpy().tobytes()) for row in batch.tensors["images"]]
    return {"step": step, "samples": batch.samples.tolist(), "epochs": batch.epochs.tolist(), "images": images}


def main() -> None:
    shards, out, rank, world_size, workers, start, stop = sys.argv[1:]
    loader = Loader(
        Data(shards=shards, window=2),
        Loading(workers=int(workers), prefetch=2),
        SIMCLR,
        seed=SEED,
        batch_size=BATCH_SIZE,
        rank=int(rank),
        world_size=int(world_size),
    )
    with open(out, "a", buffering=1) as file:
        for step in range(int(start), int(stop)):
            file.write(json.dumps(line(loader, step)) + "\n")
    loader.close()


if __name__ == "__main__":
    main()
