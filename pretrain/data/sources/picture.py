"""Picture: encoded images of sources, checked, and resized where the user wants it.

What a source holds is stored byte for byte (JPEG, PNG, WebP) unless it must change; formats that the loader does not
read become PNG. Decoding is the loader's own (pretrain/data/decode.py), so that what is checked here can be read there.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pretrain.data.decode import MAX_PIXELS, BrokenImageError, decode_image, decode_mask
from pretrain.data.sources.sample import Broken, Sample

STORED = ("jpg", "png", "webp")  # parts that hold the image, as they are named in shards
MASKS = ("instances.png", "classes.png")


def kind_of(content: bytes) -> str | None:
    """Part name of an encoded image by its first bytes, None for other formats."""
    if content[:3] == b"\xff\xd8\xff":
        return "jpg"
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "webp"
    return None


def encode_png(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 3], or labels uint8 or uint16 [H, W] -> PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def encode_labels(labels: np.ndarray) -> bytes:
    """Label map of integers [H, W], 255 and 65535 for ignore -> PNG of 8 bits where they suffice, else of 16."""
    wide = ((labels > 255) & (labels != 65535)).any()
    narrow = np.where(labels == 65535, 255, labels)
    return encode_png(labels.astype(np.uint16) if wide else narrow.astype(np.uint8))


def encode_jpeg(pixels: np.ndarray, quality: int = 95) -> bytes:
    """uint8 [H, W, 3] -> JPEG with chroma at half resolution."""
    import simplejpeg

    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality=quality, colorspace="RGB", colorsubsampling="420"
    )


def image_part(content: bytes) -> dict[str, bytes]:
    """The image under its part name; formats other than JPEG, PNG and WebP are encoded anew as PNG.

    Raises:
        BrokenImageError: the format is unknown or the content damaged.
    """
    kind = kind_of(content)
    return {kind: content} if kind else {"png": encode_png(decode_image(content))}


@dataclass(frozen=True)
class Finish:
    """What happens to each sample on its way into a shard.

    Attributes:
        resize: shorter side in pixels above which images shrink, masks with them (nearest). None: never.
        quality: of the JPEG that a shrunk JPEG becomes.
        check: decode every image, so that broken ones are found now.
        max_pixels: images with more are broken.
    """

    resize: int | None = None
    quality: int = 95
    check: bool = True
    max_pixels: int = MAX_PIXELS

    def __call__(self, sample: Sample) -> Sample | Broken:
        try:
            return Sample(sample.key, self._parts(sample.parts))
        except BrokenImageError as error:
            return Broken(sample.key, str(error))

    def _parts(self, parts: Mapping[str, bytes]) -> dict[str, bytes]:
        name = next((name for name in STORED if name in parts), None)
        if name is None or not (self.check or self.resize):
            return dict(parts)
        image = decode_image(parts[name], max_pixels=self.max_pixels)
        if not self.resize or min(image.shape[:2]) <= self.resize:
            return dict(parts)
        height, width = _shrunk(image.shape[0], image.shape[1], self.resize)
        small = np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0))
        rest = {key: content for key, content in parts.items() if key not in (*STORED, *MASKS)}
        masks = {key: self._mask(parts[key], height, width) for key in MASKS if key in parts}
        encoded = {"png": encode_png(small)} if name == "png" else {"jpg": encode_jpeg(small, self.quality)}
        return {**encoded, **masks, **rest}

    def _mask(self, content: bytes, height: int, width: int) -> bytes:
        labels = decode_mask(content, max_pixels=self.max_pixels)
        return encode_labels(np.array(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST)))


def _shrunk(height: int, width: int, shorter: int) -> tuple[int, int]:
    """Size with the given shorter side, as torchvision's Resize rounds it."""
    if height < width:
        return shorter, int(shorter * width / height)
    return int(shorter * height / width), shorter
