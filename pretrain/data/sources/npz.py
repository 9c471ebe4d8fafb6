"""The .npz files of the published AKOrN code (and of the rotating-features work before it): images and labels.

INPUT is such a file, or a folder of them whose names end in train, val or test. `images` [N, H, W], [N, H, W, C] or
[N, C, H, W], bytes or floats in [0, 1]; `labels` integers [N, H, W], 0 background, negative for pixels to ignore.
Nothing is unpickled.
"""

from __future__ import annotations

import lzma
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from configs.errors import UserError
from pretrain.data.sources.picture import encode_labels, encode_png
from pretrain.data.sources.sample import Request, Sample, key_of

IMAGES = ("images", "image", "imgs", "x")
LABELS = ("labels", "label", "masks", "mask", "instances")
SPLIT = re.compile(r"(?:^|[^a-z])(train|val|test)(?:[^a-z]|$)")


class ArraySource:
    """Images and label maps in memory."""

    classes: Sequence[str] = ()

    def __init__(self, images: np.ndarray, labels: np.ndarray | None) -> None:
        """
        Args:
            images: uint8 [N, H, W, 3]. labels: integers [N, H, W], or None.
        """
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def read(self, numbers: np.ndarray) -> Iterator[Sample]:
        """Pictures of these numbers, in this order."""
        for number in numbers.tolist():
            parts = {"png": encode_png(self.images[number])}
            if self.labels is not None:
                labels = self.labels[number].astype(np.int64)
                parts["instances.png"] = encode_labels(np.where(labels < 0, 65535, labels))
            yield Sample(key_of(number), parts)


def open_source(name: str, request: Request) -> dict[str, ArraySource]:
    """Sources by split; one without a name for a single file.

    Raises:
        UserError: no .npz files, or without images.
    """
    assert request.input is not None
    if request.input.is_file():
        return {"": _load(request.input)}
    sources = {}
    for path in sorted(request.input.glob("*.npz")):
        match = SPLIT.search(path.stem.lower())
        if match and (not request.splits or match[1] in request.splits):
            if match[1] in sources:
                raise UserError(f"{request.input} holds two files for {match[1]}; give one file as INPUT")
            sources[match[1]] = _load(path)
    if not sources:
        raise UserError(f"no .npz files named train, val or test in {request.input}; give a file as INPUT")
    return sources


def _load(path: Path) -> ArraySource:
    try:
        if not zipfile.is_zipfile(path):  # numpy would advise to unpickle it
            raise ValueError("it is no .npz file")
        with np.load(path, allow_pickle=False) as archive:
            found = next((archive[name] for name in IMAGES if name in archive), None)
            labels = next((archive[name] for name in LABELS if name in archive), None)
            if found is None:
                raise ValueError(f"it has {', '.join(archive.files) or 'nothing'}, but no 'images'")
        return ArraySource(_bytes(found), None if labels is None else _maps(labels, len(found)))
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        EOFError,
        RuntimeError,  # encrypted, or of a compression or version that zipfile does not know
        MemoryError,
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
    ) as error:
        raise UserError(f"{path} cannot be used: {error}") from error


def _bytes(images: np.ndarray) -> np.ndarray:
    """Any of the layouts -> uint8 [N, H, W, 3]."""
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim == 4 and images.shape[-1] not in (1, 3) and images.shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"images of shape {images.shape} are none")
    if images.dtype != np.uint8:
        images = _rounded(images)
    return np.ascontiguousarray(np.broadcast_to(images, (*images.shape[:3], 3)))


def _rounded(images: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1] or [0, 255] -> uint8, image by image: the published files hold gigabytes of 64-bit floats."""
    least, most = images.min(initial=0), images.max(initial=0)
    if not (least >= 0 and most <= 255):
        raise ValueError("images must be bytes, or numbers in [0, 1] or [0, 255]")
    scale = 255.0 if most <= 1 else 1.0
    rounded = np.empty(images.shape, np.uint8)
    for number, image in enumerate(images):
        rounded[number] = np.rint(image * scale)
    return rounded


def _maps(labels: np.ndarray, count: int) -> np.ndarray:
    if labels.ndim == 4 and 1 in (labels.shape[1], labels.shape[-1]):
        labels = labels.squeeze(1 if labels.shape[1] == 1 else -1)
    if labels.ndim != 3 or len(labels) != count:
        raise ValueError(f"labels of shape {labels.shape} are no maps of {count} images")
    if labels.size and (not np.equal(np.mod(labels, 1), 0).all() or labels.max() > 65535):
        raise ValueError("labels must be whole numbers below 65536")
    return labels
