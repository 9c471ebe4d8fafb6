"""Small shard sets for tests of the loader, and loaders over them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from loader_process import BATCH_SIZE, SEED, SIMCLR
from PIL import Image

from configs.schema import Data, Loading
from pretrain.data.loader import Loader
from pretrain.data.shards import ShardWriter

SIZES = (9, 4, 1, 13, 8)  # samples of the shards: of different sizes, more than one epoch in three batches
STEPS = 9


def png(number: int, side: int = 20) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_set(folder: Path, *, broken: tuple[int, ...] = (), sides: Callable[[int], int] = lambda number: 20) -> Path:
    folder.mkdir(parents=True)
    number = 0
    for shard, size in enumerate(SIZES):
        with ShardWriter(folder / f"set-{shard:03d}.tar") as writer:
            for _ in range(size):
                content = b"no image" if number in broken else png(number, sides(number))
                writer.write(f"{number:06d}", {"png": content, "cls": b"%d" % number})
                number += 1
    return folder


def make_loader(shards: Path, *, workers: int = 0, transform: Any = SIMCLR, **options: Any) -> Loader:
    data = {"window": 2} | {
        key: options.pop(key) for key in ("keep", "max_broken", "lanes", "parts", "key_pattern") if key in options
    }
    loading = {"workers": workers} | {key: options.pop(key) for key in ("prefetch", "timeout_s") if key in options}
    options = {"seed": SEED, "batch_size": BATCH_SIZE} | options
    return Loader(Data(shards=str(shards), **data), Loading(**loading), transform, **options)


def joined(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """One step of all ranks as one process would have it."""
    return {
        key: value if key == "step" else [item for part in lines for item in part[key]]
        for key, value in lines[0].items()
    }


def run(loader: Loader, steps: int = STEPS) -> None:
    for step in range(steps):
        loader[step]
