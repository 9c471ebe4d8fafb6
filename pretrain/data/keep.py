"""A data set kept decoded in memory: for sets that fit, CIFAR-10 and generated scenes.

Owns: reading a whole shard set once, images decoded, into one block that the loader's workers share, or onto the
device; a later start takes what an earlier one decoded (decoded.py). A sample that is broken stays so: reading it
raises what reading it from disk raises.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError
from pretrain.data import crop, decode, decoded
from pretrain.data.fetch import TRIES, place_of, replacement
from pretrain.data.ledger import Skipped
from pretrain.data.memory import Memory
from pretrain.data.shards import DamagedSample, ShardReader
from pretrain.data.views import SimclrTransform

THREADS = 8
CHUNK = 64  # samples that a thread takes at once: reading a small image takes no longer than handing it out


@dataclass(frozen=True)
class Part:
    """One part of one sample on its way into memory: its name, and pixels or bytes."""

    name: str
    content: np.ndarray


class Kept:
    """The parts of all samples, images as pixels. Reads as a ShardReader does; picklable into workers, not copied.

    Args:
        writes: whether what was decoded is stored for later starts, as on one rank.

    Attributes:
        names, table: see `decoded.Decoded`.
        image_row: int64 [N], the row of each sample's image, -1 where there is none.

    Raises (when made):
        UserError: the machine's memory does not hold the set.
    """

    def __init__(
        self, reader: ShardReader, *, only: Sequence[str] | None, max_pixels: int, writes: bool = False
    ) -> None:
        self.index = reader.index
        self.broken: dict[int, DamagedSample] = {}
        path, key = decoded.path_of(self.index, only), decoded.key_of(self.index, only, max_pixels)
        known = decoded.load(path, key)
        if known is not None:
            self.names, self.table, self._first = known.names, known.table, known.first
            self._block = Memory(known.memory.nbytes)
            self.memory[: known.memory.nbytes] = known.memory
        else:
            self._lay_out(self._decode(reader, only, max_pixels))
            if writes and not self.broken:
                decoded.store(path, key, decoded.Decoded(self.names, self.table, self._first, self.memory))
        self.image_row = np.full(len(self.index), -1)
        images = np.flatnonzero(self.table[:, 3])
        self.image_row[np.searchsorted(self._first, images, side="right") - 1] = images

    def read(self, sample: int, *, only: Any = None) -> dict[str, Any]:
        """Parts of a sample: images uint8 [H, W, 3], others bytes.

        Raises:
            DamagedSample: as when it was read.
        """
        if sample in self.broken:
            raise self.broken[sample]
        parts: dict[str, Any] = {}
        for name, offset, size, height, width in self.table[self._first[sample] : self._first[sample + 1]].tolist():
            content = self.memory[offset : offset + size]
            parts[self.names[name]] = content.reshape(height, width, 3) if height else content.tobytes()
        return parts

    def images(self) -> np.ndarray:
        """All images, uint8 [N, H, W, 3]; broken ones are black.

        Raises:
            UserError: they differ in size.
        """
        whole = np.flatnonzero(self.image_row >= 0)
        sizes = np.unique(self.table[self.image_row[whole], 3:], axis=0)
        if len(sizes) != 1:
            raise UserError(
                "data.keep=device needs images of one size: write the shards with --resize, or keep: memory"
            )
        height, width = sizes[0].tolist()
        images = np.zeros((len(self.index), height, width, 3), np.uint8)
        for sample in whole:
            offset = self.table[self.image_row[sample], 1]
            images[sample] = self.memory[offset : offset + height * width * 3].reshape(height, width, 3)
        return images

    def _decode(self, reader: ShardReader, only: Sequence[str] | None, max_pixels: int) -> list[list[Part]]:
        samples = range(len(self.index))
        chunks = [samples[first : first + CHUNK] for first in samples[::CHUNK]]
        with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
            contents = pool.map(lambda chunk: [self._content(reader, one, only, max_pixels) for one in chunk], chunks)
            return [parts for content in contents for parts in content]

    def _content(self, reader: ShardReader, sample: int, only: Sequence[str] | None, max_pixels: int) -> list[Part]:
        try:
            parts: dict[str, bytes] = reader.read(sample, only=only)
            image = next((name for name in decode.IMAGE_PARTS if name in parts), None)
            return [
                Part(name, decode.decode_image(content, max_pixels=max_pixels))
                if name == image
                else Part(name, np.frombuffer(content, np.uint8))
                for name, content in parts.items()
            ]
        except DamagedSample as error:
            self.broken[sample] = error
        except decode.BrokenImageError as error:
            self.broken[sample] = DamagedSample(*place_of(self.index, sample), str(error))
        return []

    def _lay_out(self, contents: list[list[Part]]) -> None:
        """Copy everything into one block, and note what lies where."""
        self.names = sorted({part.name for parts in contents for part in parts})
        self._first = np.concatenate([[0], np.cumsum([len(parts) for parts in contents])]).astype(np.int64)
        flat = [part for parts in contents for part in parts]
        self.table = np.zeros((len(flat), 5), np.int64)
        offset = 0
        for row, part in enumerate(flat):
            height, width = part.content.shape[:2] if part.content.ndim == 3 else (0, 0)
            self.table[row] = self.names.index(part.name), offset, part.content.nbytes, height, width
            offset += part.content.nbytes
        self._block = Memory(offset)
        for row, part in enumerate(flat):
            self.memory[self.table[row, 1] :][: part.content.nbytes] = part.content.reshape(-1)

    @property
    def memory(self) -> np.ndarray:
        """The block that holds it all, uint8."""
        return self._block.bytes()


class KeptViews:
    """Views of a set kept decoded, a batch at a time.

    Args:
        kept: the set.
        transform: whose views are made.
        device: None: made on the host; else the images (of one size) are kept there, and views are made there.
    """

    def __init__(self, kept: Kept, transform: SimclrTransform, device: torch.device | None) -> None:
        self.kept, self.transform = kept, transform
        for sample in np.flatnonzero(kept.image_row < 0).tolist():
            reason = "no image among its parts"
            kept.broken.setdefault(sample, DamagedSample(*place_of(kept.index, sample), reason))
        self.images: Tensor | None = None
        if device is not None:
            self.images = torch.from_numpy(kept.images()).permute(0, 3, 1, 2).contiguous().to(device)

    def __call__(self, epochs: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, Tensor, list[Skipped]]:
        """(samples used [b], views uint8 [b, V, 3, S, S], broken samples met)."""
        used, skipped = self._replaced(epochs, samples)
        draws = self.transform.draws(epochs, used)
        rows = self.kept.image_row[used].repeat(draws.shape[1])
        boxes = self.transform.crops.boxes(draws.reshape(-1, draws.shape[2]), *self.kept.table[rows, 3:].T)
        views = self._on_host(rows, boxes) if self.images is None else self._on_device(used, boxes)
        return used, views.unflatten(0, draws.shape[:2]), skipped

    def _on_host(self, rows: np.ndarray, boxes: np.ndarray) -> Tensor:
        size, memory, table = self.transform.views.size, self.kept.memory, self.kept.table[rows]
        library = crop.native()
        if library is not None:
            addresses = memory.ctypes.data + table[:, 1]
            return torch.from_numpy(crop.resized_at(library, addresses, 3 * table[:, 4], boxes, size))
        images = [memory[at : at + count].reshape(height, width, 3) for _, at, count, height, width in table.tolist()]
        views = [crop.resized(image, box, size) for image, box in zip(images, boxes.tolist())]
        return torch.from_numpy(np.stack(views))

    def _on_device(self, used: np.ndarray, boxes: np.ndarray) -> Tensor:
        assert self.images is not None
        device, views = self.images.device, self.transform.num_views
        rows = torch.from_numpy(used.repeat(views)).to(device, non_blocking=True)
        return crop.resized_batch(
            self.images[rows], torch.from_numpy(boxes).to(device, non_blocking=True), self.transform.views.size
        )

    def _replaced(self, epochs: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, list[Skipped]]:
        used, skipped = samples.copy(), []
        for row in np.flatnonzero(np.isin(samples, list(self.kept.broken))):
            epoch, sample = int(epochs[row]), int(samples[row])
            for attempt in range(TRIES):
                error = self.kept.broken.get(int(used[row]))
                if error is None:
                    break
                skipped.append(Skipped(int(used[row]), error.shard, error.key, error.reason))
                used[row] = replacement(self.transform.seed, epoch, sample, attempt, len(self.kept.index))
        return used, skipped
