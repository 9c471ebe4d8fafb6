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
from typing import NamedTuple

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


class Source(NamedTuple):
    """An encoded image whose header has been read, or decoded pixels.

    Attributes:
        kind: jpeg (for the fast decoder), other (for Pillow) or pixels.
    """

    content: bytes | np.ndarray
    height: int
    width: int
    kind: str

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

    def coarsest(self, boxes: Sequence[Box], size: int) -> tuple[int, Sequence[Box]]:
        """By which factor the image may be decoded coarser for boxes of `size` output pixels, and the boxes there."""
        factor = _factor(boxes, size) if self.kind == "jpeg" else 1
        if factor == 1:
            return factor, boxes
        return factor, _scaled(boxes, factor, -(-self.height // factor), -(-self.width // factor))

    def pixels(self, factor: int = 1, *, passing: bool = False) -> np.ndarray:
        """Decode: uint8 [H, W, 3], by `factor` (of `coarsest`) smaller along each side, rounded up.

        Args:
            passing: the pixels are valid until this thread decodes the next image: they lie in memory that is used
                again, since fresh pages cost a fifth of the decoding.

        Raises:
            BrokenImageError: the content is truncated or damaged.
        """
        if isinstance(self.content, np.ndarray):
            return self.content
        if self.kind != "jpeg":
            return _decode_other(self.content)
        buffer = _scratch(3 * self.height * self.width) if passing else None
        return _decode_jpeg(self.content, self.height, self.width, factor, buffer)


def decode_image(content: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An encoded image as RGB, uint8 [H, W, 3].

    Raises:
        BrokenImageError: it is damaged, of an unknown format, or has more than `max_pixels`.
    """
    return Source.read(content, max_pixels=max_pixels).pixels()


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
    room = min([side for box in boxes for side in box[2:]]) / (LEAST_ZOOM * size)
    return 8 if room >= 8 else 4 if room >= 4 else 2 if room >= 2 else 1


def _scaled(boxes: Sequence[Box], factor: int, height: int, width: int) -> list[Box]:
    """Boxes on the grid that is `factor` times coarser, inside height x width."""
    scaled = []
    for top, left, h, w in boxes:
        y, x = min(round(top / factor), height - 1), min(round(left / factor), width - 1)
        bottom, right = min(round((top + h) / factor), height), min(round((left + w) / factor), width)
        scaled.append((y, x, max(1, bottom - y), max(1, right - x)))
    return scaled


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
        rows, columns = -(-height // factor), -(-width // factor)
        return simplejpeg.decode_jpeg(
            content, "RGB", min_height=rows, min_width=columns, min_factor=factor, buffer=buffer
        )
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
