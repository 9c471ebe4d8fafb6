"""Evaluation data: samples of a shard set as tensors, cut and resized by protocol.

Owns: which part of an image a protocol looks at, how images and masks are resized, and reading blocks of samples on
several threads. Blocks are fixed by position, so that a score never depends on the number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from configs.errors import UserError
from configs.presets import Preset
from downstream.metrics import IGNORE
from pretrain.data.decode import IMAGE_PARTS, BrokenImageError, decode_image, decode_mask
from pretrain.data.index import ShardIndex
from pretrain.data.shards import DamagedSample, ShardReader

INSTANCES, CLASSES, LABEL = "instances.png", "classes.png", "cls"


@dataclass(frozen=True)
class Scene:
    """Images with their masks. B images of S x S pixels.

    Attributes:
        images: [B, 3, S, S] float32 in [0, 1].
        instances: [B, S, S] int64: 0 background, -1 ignored, 1.. objects. classes: the same by class, or None.
        samples: positions in the data set.
    """

    images: Tensor
    instances: Tensor
    classes: Tensor | None
    samples: list[int]


class Samples:
    """A shard set for evaluation: the first `limit` samples of it.

    Raises:
        UserError: there is no shard set, or it lacks a part in `needs`.
    """

    def __init__(
        self, location: str, *, limit: int | None = None, needs: tuple[str, ...] = (), workers: int = 2
    ) -> None:
        if not location:
            raise UserError("no data to evaluate on: give data=SHARDS (made by pretrain/make_shards.py)")
        if ":" not in location and "{" not in location and not Path(location).exists():
            raise UserError(f"no shards at {location}; python pretrain/make_shards.py --help says how to make them")
        self.location = location
        self.index = ShardIndex.open(location)
        self.reader = ShardReader(self.index)
        lacking = [part for part in needs if part not in self.index.part_names]
        if lacking:
            there, needed = ", ".join(self.index.part_names), ", ".join(lacking)
            raise UserError(f"{location} has no part {needed}, which this evaluation needs: it holds {there}")
        self._masks = [part for part in (INSTANCES, CLASSES) if part in self.index.part_names]
        self._images = [part for part in self.index.part_names if part in IMAGE_PARTS]
        self._length = min(len(self.index), limit or len(self.index))
        self._pool = ThreadPoolExecutor(workers)

    def __len__(self) -> int:
        return self._length

    @property
    def fingerprint(self) -> str:
        """What the data set is: digest of its shards, and how much of it is used."""
        return f"{self.index.fingerprint}:{len(self)}"

    def labels(self) -> Tensor:
        """Class of every sample, [N] int64.

        Raises:
            UserError: a sample has none.
        """
        labels = torch.from_numpy(np.array(self.index.labels[: len(self)], dtype=np.int64))
        if len(labels) and int(labels.min()) < 0:
            raise UserError(f"{self.location} has samples without a class label (part {LABEL})")
        return labels

    def blocks(self, size: int) -> list[range]:
        """Positions in blocks of `size`, the last one shorter."""
        return [range(start, min(start + size, len(self))) for start in range(0, len(self), size)]

    def scenes(self, samples: Sequence[int], preset: Preset) -> Scene:
        """Read samples with their masks under a protocol.

        Raises:
            UserError: a sample cannot be read, lacks a mask, or its mask's size is not that of its image.
        """
        parts = {*self._images, *self._masks}
        read = list(self._pool.map(lambda sample: self._scene(sample, parts, preset), samples))
        images, instances, classes = zip(*read)
        return Scene(
            torch.stack(images),
            torch.stack(instances),
            torch.stack(classes) if CLASSES in self._masks else None,
            list(samples),
        )

    def images(self, samples: Sequence[int], *, resize: int, size: int) -> Tensor:
        """Images [B, 3, size, size] in [0, 1]: shorter side to `resize` (bicubic, antialiased), centre crop."""
        read = self._pool.map(lambda sample: centre_crop(self.image(sample), resize=resize, size=size), samples)
        return torch.stack(list(read))

    def image(self, sample: int) -> Tensor:
        """One image, [3, H, W] float32 in [0, 1], as stored."""
        return self._decoded(sample, set(self._images))[0]

    def _scene(self, sample: int, parts: set[str], preset: Preset) -> tuple[Tensor, Tensor, Tensor]:
        image, masks = self._decoded(sample, parts)
        for part in self._masks:
            if part not in masks:
                raise UserError(f"{self.location}: sample {self.index.keys([sample])[0]} has no {part}, others have")
            mask = masks[part]
            if not _same_cut(image.shape[1:], mask.shape, preset):
                sizes = f"{mask.shape[1]} x {mask.shape[0]} pixels, its image {image.shape[2]} x {image.shape[1]}"
                raise UserError(f"{self.location}: sample {self.index.keys([sample])[0]}: {part} has {sizes}")
        cut = [_cut_mask(masks[part], preset) for part in self._masks]
        return _cut_image(image, preset), cut[0], cut[-1]  # each stands for the other where there is one

    def _decoded(self, sample: int, parts: set[str]) -> tuple[Tensor, dict[str, Tensor]]:
        try:
            content = self.reader.read(sample, only=parts)
            image = decode_image(next(content[part] for part in self._images if part in content))
            masks = {part: content[part] for part in (INSTANCES, CLASSES) if part in content}
            return to_float(image), {part: _labels(data) for part, data in masks.items()}
        except (BrokenImageError, DamagedSample, StopIteration) as error:
            key = self.index.keys([sample])[0]
            raise UserError(
                f"{self.location}: sample {key} cannot be evaluated: {error or 'it has no image'}"
            ) from error


def to_float(image: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] -> float32 [3, H, W] in [0, 1]."""
    return torch.from_numpy(image).permute(2, 0, 1).float() / 255


def centre_crop(image: Tensor, *, resize: int, size: int) -> Tensor:
    """Image [3, H, W]: shorter side to `resize` pixels (bicubic, antialiased), then the central `size` x `size`."""
    height, width = image.shape[1:]
    scale = resize / min(height, width)
    shape = max(size, round(height * scale)), max(size, round(width * scale))
    if shape != (height, width):
        image = F.interpolate(image[None], size=shape, mode="bicubic", antialias=True)[0].clamp(0, 1)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return image[:, top : top + size, left : left + size]


def _labels(content: bytes) -> Tensor:
    """A mask [H, W] int64; 255 of 8 bits and 65535 of 16 become IGNORE."""
    mask = torch.from_numpy(decode_mask(content)).long()
    sixteen_bits = content[24:25] == b"\x10"  # the bit depth in a PNG's header
    return torch.where(mask == (65535 if sixteen_bits else 255), IGNORE, mask)


def _same_cut(image: torch.Size, mask: torch.Size, preset: Preset) -> bool:
    """Whether a protocol takes the same part of an image and of its mask, by their sizes (height, width)."""
    if image == mask:
        return True
    return image[0] * mask[1] == image[1] * mask[0] and preset.raw not in (tuple(image), tuple(mask))


def _cut_image(image: Tensor, preset: Preset) -> Tensor:
    return _cut(image[None], preset, preset.resize)[0].clamp(0, 1)


def _cut_mask(mask: Tensor, preset: Preset) -> Tensor:
    return _cut(mask[None, None].float(), preset, "nearest")[0, 0].long()


def _cut(image: Tensor, preset: Preset, mode: str) -> Tensor:
    """Image [1, C, H, W] -> [1, C, size, size]: as it is, by the protocol's box, or shorter side and centre."""
    height, width = image.shape[2:]
    size = preset.size
    if (height, width) == (size, size):
        return image
    if preset.raw == (height, width) and preset.box is not None:
        top, left, box_height, box_width = preset.box
        return _resized(image[:, :, top : top + box_height, left : left + box_width], (size, size), mode)
    scale = size / min(height, width)
    image = _resized(image, (max(size, round(height * scale)), max(size, round(width * scale))), mode)
    top, left = (image.shape[2] - size) // 2, (image.shape[3] - size) // 2
    return image[:, :, top : top + size, left : left + size]


def _resized(image: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    if tuple(image.shape[2:]) == size:
        return image
    if mode == "nearest":
        return F.interpolate(image, size=size, mode="nearest-exact")
    return F.interpolate(image, size=size, mode="bilinear", antialias=True)
