"""Two views of an image, per core: ours against the published pipeline and against the bare decoder, in one run.

    python tests/benchmarks/data.py IMAGES.tar [--sizes 224 96 32] [--rounds 5] [--json]

The tar holds JPEGs. All run on one thread over the same images in alternating rounds, under the allocator settings that
the launcher gives to jobs on CPU; times are processor seconds of this process, so that other load on the machine counts
little. Printed are images per second and core, and ratios.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SETTINGS = {"OMP_NUM_THREADS": "1", "THP_MEM_ALLOC_ENABLE": "1"}
if __name__ == "__main__" and any(os.environ.get(name) != value for name, value in SETTINGS.items()):
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **SETTINGS})  # read when a process starts
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torchvision import transforms

from configs.schema import Views
from pretrain.data import crop, workers
from pretrain.data.batch import Batch
from pretrain.data.colour import Colour
from pretrain.data.fetch import Fetcher
from pretrain.data.index import ShardIndex
from pretrain.data.shards import ShardReader, ShardWriter
from pretrain.data.views import CropRange, SimclrTransform

CHUNK = 50
HALF = (0.5, 0.5, 0.5)


def read_jpegs(path: Path) -> list[bytes]:
    with tarfile.open(path) as tar:
        files = [tar.extractfile(member) for member in tar if member.isfile()]
        return [file.read() for file in files if file is not None]


class Published:
    """PIL and torchvision, as SimCLR pipelines are published: decode, then crop, colour and normalise each view."""

    def __init__(self, size: int) -> None:
        jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8)
        self.crop = transforms.RandomResizedCrop(size)
        self.colour = transforms.Compose(
            [
                transforms.RandomHorizontalFlip(),
                jitter,
                transforms.RandomGrayscale(0.2),
                transforms.ToTensor(),
                transforms.Normalize(HALF, HALF),
            ]
        )

    def __call__(self, content: bytes) -> list[torch.Tensor]:
        image = Image.open(io.BytesIO(content)).convert("RGB")
        return [self.colour(self.crop(image)) for _ in range(2)]


def bare(content: bytes, size: int, box: Callable[[int, int], Any]) -> list[np.ndarray]:
    """The decoder and two antialiased resizes of torchvision, and nothing else."""
    image = simplejpeg.decode_jpeg(content, "RGB")
    return [crop.resized(image, box(*image.shape[:2]), size) for _ in range(2)]


class Ours:
    """The host's and the device's part as the loader runs them, over a shard set of the same images."""

    def __init__(self, contents: Sequence[bytes], size: int, folder: Path) -> None:
        with ShardWriter(folder / "bench-000.tar") as writer:
            for number, content in enumerate(contents):
                writer.write(f"{number:06d}", {"jpg": content})
        section = Views(size=size, flip=0.5)
        index = ShardIndex.open(folder)
        self.fetcher = Fetcher(ShardReader(index), SimclrTransform(section, 0), 0, len(index))
        self.colour = Colour(section, HALF, HALF)
        self.slot = {
            "epochs": np.zeros(CHUNK, np.int64),
            "samples": np.zeros(CHUNK, np.int64),
            "images": np.zeros((CHUNK, 2, 3, size, size), np.uint8),
        }

    def host(self, first: int, count: int) -> None:
        self.slot["samples"][:count] = np.arange(first, first + count)
        assert not workers.fill(self.fetcher, self.slot, range(count))

    def device(self, count: int) -> torch.Tensor:
        places = torch.arange(count)
        images = torch.from_numpy(self.slot["images"][:count])
        return self.colour(Batch({"images": images}, samples=places, epochs=places, positions=places, seed=0))


class Clock:
    """Processor seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def run(self, name: str, work: Callable[[], Any]) -> None:
        begin = time.process_time()
        work()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - begin


def measure(contents: Sequence[bytes], size: int, rounds: int) -> dict[str, float]:
    """Images per second and core of each part, and the ratios of the bars."""
    published, rng, clock = Published(size), np.random.default_rng(0), Clock()
    crops = CropRange((0.08, 1.0), (3 / 4, 4 / 3))
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(contents, size, Path(folder))
        ours.host(0, 1)
        ours.device(1)  # compiles
        for _ in range(rounds):
            for first in range(0, len(contents), CHUNK):
                part = contents[first : first + CHUNK]
                views = [published.crop(Image.open(io.BytesIO(content)).convert("RGB")) for content in part[:10]]
                clock.run("published", lambda part=part: [published(content) for content in part])
                clock.run("host", lambda part=part, first=first: ours.host(first, len(part)))
                clock.run("device", lambda part=part: ours.device(len(part)))
                draws = crops.draws(rng.integers(0, 2**63, 2 * len(part), np.uint64)).tolist()
                box = lambda h, w, draws=draws: crops.box(draws.pop(), h, w)  # noqa: E731
                clock.run("bare", lambda part=part, box=box: [bare(content, size, box) for content in part])
                clock.run("decoder", lambda part=part: [simplejpeg.decode_jpeg(content, "RGB") for content in part])
                scale = len(part) / len(views)
                clock.run("PIL colour / scale", lambda views=views: [published.colour(view) for view in views * 2])
                clock.seconds["PIL colour"] = (
                    clock.seconds.get("PIL colour", 0.0) + clock.seconds.pop("PIL colour / scale") * scale
                )
    rates = {name: rounds * len(contents) / seconds for name, seconds in clock.seconds.items()}
    both = 1 / (1 / rates["host"] + 1 / rates["device"])
    return {
        **rates,
        "ours": both,
        "ours / published": both / rates["published"],
        "host / bare": rates["host"] / rates["bare"],
        "device / PIL colour": rates["device"] / rates["PIL colour"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 96, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=300, help="images used")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    contents = read_jpegs(args.images)[: args.limit]
    results = {size: measure(contents, size, args.rounds) for size in args.sizes}
    if args.json:
        print(json.dumps(results))
        return 0
    for size, result in results.items():
        print(f"{size} px, {len(contents)} images, {args.rounds} rounds")
        for name, value in result.items():
            print(f"  {name:22s} {value:9.2f}" + ("" if "/" in name else " images/s and core"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
