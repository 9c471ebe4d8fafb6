"""Bytes to pixels: JPEG through libjpeg-turbo (simplejpeg), everything else through Pillow.

Every image becomes 8-bit RGB: grey is repeated, palettes and CMYK are converted, transparency is laid on black as
Pillow's `convert("RGB")` does (the alpha channel is dropped), 16 bits are cut to their upper 8. EXIF rotation is *not*
applied, as in torchvision's ImageFolder and the published pipeline, so that masks, boxes and pixels agree. The number
of pixels is checked in the header, before anything is decoded. Truncated files are broken, not filled with grey.

Scaled decoding: where both crops of a view are much larger than the view, libjpeg-turbo decodes at 1/2, 1/4 or 1/8 by
smaller inverse DCTs (each averages the pixels it stands for). The crop is then rounded to the coarser grid.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

IMAGE_PARTS = ("image", "jpg", "jpeg", "png", "webp", "jpe", "ppm", "bmp", "tif", "tiff", "gif")
MAX_PIXELS = 89_478_485

# A box of a coarsely decoded image keeps at least this many pixels per output pixel along each side.
LEAST_ZOOM = 1.0

Box = tuple[int, int, int, int]

LEAST_SCRATCH, MOST_SCRATCH = 1 << 22, 1 << 26
_LOCAL = threading.local()
_NOTHING = np.empty(0, np.uint8)


class BrokenImageError(ValueError):
    """An image that cannot be used; the message says why."""


@dataclass(frozen=True)
class Source:
    """An encoded image whose header has been read, or decoded pixels."""

    content: bytes | np.ndarray
    height: int
    width: int
    kind: str
    """jpeg (for the fast decoder), other (for Pillow) or pixels."""

    @classmethod
    def of(cls, parts: Mapping[str, bytes | np.ndarray], *, max_pixels: int = MAX_PIXELS) -> Source:
        """The image among the parts of a sample.

        Raises:
            BrokenImageError: there is none, its header cannot be read, or it has more than `max_pixels`.
        """
        for name in IMAGE_PARTS:
            if name in parts:
                return cls.read(parts[name], max_pixels=max_pixels)
        raise BrokenImageError("no image among its parts")

    @classmethod
    def read(cls, content: bytes | np.ndarray, *, max_pixels: int = MAX_PIXELS) -> Source:
        """Read the header of an encoded image, or take pixels uint8 [H, W, 3] as they are."""
        if isinstance(content, np.ndarray):
            return cls(content, content.shape[0], content.shape[1], "pixels")
        height, width, kind = _header(content)
        if height * width > max_pixels:
            raise BrokenImageError(f"{width} x {height} pixels are over the limit of {max_pixels} (data.max_pixels)")
        return cls(content, height, width, kind)

    def pixels(self, boxes: Sequence[Box] = (), size: int = 0) -> tuple[np.ndarray, list[Box]]:
        """Decode: uint8 [H, W, 3], and the boxes in the pixels returned (coarser where the boxes allow it).

        With boxes the pixels are valid until this thread decodes the next image: they lie in memory that is used again,
        since fresh pages cost a fifth of the decoding.

        Raises:
            BrokenImageError: the content is truncated or damaged.
        """
        if isinstance(self.content, np.ndarray):
            return self.content, list(boxes)
        if self.kind != "jpeg":
            return _decode_other(self.content), list(boxes)
        factor = _factor(boxes, size)
        buffer = _scratch(3 * self.height * self.width) if boxes else None
        image = _decode_jpeg(self.content, self.height, self.width, factor, buffer)
        if factor == 1:
            return image, list(boxes)
        return image, [_scaled(box, factor, image.shape[0], image.shape[1]) for box in boxes]


def decode_image(content: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An encoded image as RGB, uint8 [H, W, 3].

    Raises:
        BrokenImageError: it is damaged, of an unknown format, or has more than `max_pixels`.
    """
    return Source.read(content, max_pixels=max_pixels).pixels()[0]


def decode_mask(content: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A label map (PNG of 8 or 16 bits, grey or palette: indices, not colours), int32 [H, W].

    Raises:
        BrokenImageError: it is damaged, has colour channels, or more than `max_pixels`.
    """
    with _opened(content) as image:
        if image.width * image.height > max_pixels:
            raise BrokenImageError(f"mask of {image.width} x {image.height} pixels is over the limit of {max_pixels}")
        if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
            raise BrokenImageError(f"mask has mode {image.mode}; it must be grey or palette, a label per pixel")
        return np.array(_loaded(image)).astype(np.int32)


def _factor(boxes: Sequence[Box], size: int) -> int:
    """The coarsest of 1, 2, 4, 8 at which every box still has `LEAST_ZOOM * size` pixels along each side."""
    if not boxes:
        return 1
    room = min(min(height, width) for _, _, height, width in boxes) / (LEAST_ZOOM * size)
    return max(factor for factor in (1, 2, 4, 8) if factor <= max(1, room))


def _scaled(box: Box, factor: int, height: int, width: int) -> Box:
    """A box on the grid that is `factor` times coarser, inside height x width."""
    top, left = min(round(box[0] / factor), height - 1), min(round(box[1] / factor), width - 1)
    bottom, right = round((box[0] + box[2]) / factor), round((box[1] + box[3]) / factor)
    return top, left, max(1, min(bottom, height) - top), max(1, min(right, width) - left)


def _header(content: bytes) -> tuple[int, int, str]:
    """(height, width, kind) without decoding."""
    if content[:2] == b"\xff\xd8":
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
            if colours in ("YCbCr", "Gray", "RGB"):
                return height, width, "jpeg"
        except ValueError:
            pass  # Pillow has the last word, and the better message
    with _opened(content) as image:
        return image.height, image.width, "other"


def _scratch(num_bytes: int) -> np.ndarray | None:
    """Memory of this thread, uint8, of at least so many bytes; None for images too large to keep room for."""
    if num_bytes > MOST_SCRATCH:
        return None
    if getattr(_LOCAL, "buffer", _NOTHING).nbytes < num_bytes:
        _LOCAL.buffer = np.empty(max(num_bytes, LEAST_SCRATCH), np.uint8)
    return _LOCAL.buffer


def _decode_jpeg(content: bytes, height: int, width: int, factor: int, buffer: np.ndarray | None) -> np.ndarray:
    try:
        if factor == 1:
            return simplejpeg.decode_jpeg(content, "RGB", buffer=buffer)
        least = {"min_height": -(-height // factor), "min_width": -(-width // factor), "min_factor": factor}
        return simplejpeg.decode_jpeg(content, "RGB", **least, buffer=buffer)
    except ValueError as error:
        raise BrokenImageError(f"JPEG: {error}") from error


def _decode_other(content: bytes) -> np.ndarray:
    with _opened(content) as image:
        _loaded(image)
        if image.mode.startswith("I"):  # 16 bits, which Pillow would clip
            return np.repeat((np.array(image).astype(np.int64) >> 8).astype(np.uint8)[..., None], 3, axis=2)
        return np.array(image.convert("RGB"))


def _opened(content: bytes) -> Image.Image:
    """Pillow's image, header read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the caller checks the size
            return Image.open(io.BytesIO(content))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        what = "no bytes" if not content else f"no image format known begins with {content[:8].hex(' ')}"
        reason = what if isinstance(error, UnidentifiedImageError) else str(error)
        raise BrokenImageError(reason) from error


def _loaded(image: Image.Image) -> Image.Image:
    """The image with its pixels decoded."""
    try:
        image.load()
    except Exception as error:  # Pillow's plug-ins raise whatever they meet in damaged files
        raise BrokenImageError(f"{image.format}: {error}") from error
    return image
