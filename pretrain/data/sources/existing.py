"""Existing: a shard set as a source, to write foreign shards anew and shuffled, and to read spooled streams."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from pretrain.data.decode import BrokenImageError
from pretrain.data.index import ShardIndex
from pretrain.data.shards import DamagedSample, ShardReader, ShardWriter
from pretrain.data.sources.picture import image_part
from pretrain.data.sources.sample import Broken, Request, Sample, key_of

IMAGE_PARTS = "jpg;jpeg;png;webp;image;bmp;tif;tiff;gif;ppm"
KEPT = {
    "cls": "cls;class;label;cls.txt;label.txt",
    "instances.png": "instances.png",
    "classes.png": "classes.png",
    "json": "json",
    "txt": "txt;caption",
}


class ShardSource:
    """Samples of a shard set; the image under the name of its format, other parts as they are."""

    classes: Sequence[str] = ()

    def __init__(self, index: ShardIndex) -> None:
        self.reader = ShardReader(index)

    def __len__(self) -> int:
        return len(self.reader.index)

    def read(self, numbers: np.ndarray) -> Iterator[Sample | Broken]:
        """Samples of these numbers, in this order."""
        for number, key in zip(numbers.tolist(), self.reader.index.keys(numbers)):
            try:
                parts = self.reader.read(number)
                image = parts.pop("image", None)
                if image is None:
                    raise BrokenImageError(f"no image among its parts ({', '.join(parts) or 'none'})")
                yield Sample(key_of(number, key), {**image_part(image), **parts})
            except DamagedSample as error:
                yield Broken(f"{error.shard}: {error.key}", error.reason)
            except BrokenImageError as error:
                yield Broken(key, str(error))


def open_source(name: str, request: Request) -> dict[str, ShardSource]:
    """Shards of a folder or brace pattern, with the parts that are known under one of their usual names.

    Raises:
        UserError: no shards, or none with images.
    """
    assert request.input is not None
    return {"": from_shards(request.input)}


def from_shards(location: Path) -> ShardSource:
    """A source of the shards there."""
    stored = ShardIndex.open(location).stored_parts
    known = {part: names for part, names in KEPT.items() if set(names.split(";")) & set(stored)}
    return ShardSource(ShardIndex.open(location, parts={"image": IMAGE_PARTS, **known}))


def spool(samples: Iterable[Sample], folder: Path) -> ShardSource:
    """Write a stream of samples to one tar in a temporary folder, so that it can be read in any order.

    A tar that is there already, from an interrupted call, is taken as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "spool.tar"
    if not path.exists():
        with ShardWriter(path) as writer:
            for sample in samples:
                writer.write(sample.key, sample.parts)
    return from_shards(folder)
