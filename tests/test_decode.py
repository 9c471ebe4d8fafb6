"""Decoding: every kind of image becomes the RGB that Pillow or libjpeg says, or a clear reason why not."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data as photographs

from pretrain.data import decode
from pretrain.data.decode import BrokenImageError

PHOTO = np.ascontiguousarray(photographs.astronaut()[:240, :301])


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


JPEG = encoded(Image.fromarray(PHOTO), "JPEG", quality=90)
PNG = encoded(Image.fromarray(PHOTO), "PNG")


def test_jpeg_equals_pillows_decoding() -> None:
    for content in (JPEG, encoded(Image.fromarray(PHOTO), "JPEG", progressive=True, subsampling=0)):
        ours = decode.decode_image(content).astype(int)
        theirs = np.array(Image.open(io.BytesIO(content)).convert("RGB"))
        assert ours.shape == PHOTO.shape
        assert np.abs(ours - theirs).mean() < 0.2  # both are libjpeg-turbo, of different versions
        assert np.abs(ours - theirs).max() <= 4


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_lossless_kinds_come_back(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(decode.decode_image(encoded(Image.fromarray(PHOTO), kind, **options)), PHOTO)


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "LA", "1"])
def test_other_modes_become_rgb_as_pillow_converts(mode: str) -> None:
    image = Image.fromarray(PHOTO).convert(mode)
    content = encoded(image, "JPEG" if mode == "CMYK" else "PNG")
    assert np.array_equal(decode.decode_image(content), np.array(Image.open(io.BytesIO(content)).convert("RGB")))


def test_grey_jpeg_is_repeated() -> None:
    image = decode.decode_image(encoded(Image.fromarray(PHOTO).convert("L"), "JPEG"))
    assert (image[..., 0] == image[..., 1]).all()
    assert image.std() > 10


def test_sixteen_bits_keep_their_upper_eight() -> None:
    values = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    image = decode.decode_image(encoded(Image.fromarray(values), "PNG"))
    assert np.array_equal(image[..., 1], values >> 8)


def test_exif_rotation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    content = encoded(Image.fromarray(PHOTO), "JPEG", exif=exif)
    assert decode.decode_image(content).shape == PHOTO.shape


def huge_png(side: int) -> bytes:
    """Valid headers and hardly any pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def test_the_pixel_limit_is_checked_before_decoding() -> None:
    with pytest.raises(BrokenImageError, match=r"over the limit|exceeds limit"):
        decode.decode_image(huge_png(60_000))
    with pytest.raises(BrokenImageError, match="301 x 240 pixels are over the limit of 1000"):
        decode.decode_image(JPEG, max_pixels=1000)


@pytest.mark.parametrize("content", [JPEG, PNG], ids=["jpeg", "png"])
@pytest.mark.parametrize("share", [0.001, 0.01, 0.3, 0.9])
def test_truncated_files_are_broken(content: bytes, share: float) -> None:
    with pytest.raises(BrokenImageError):
        decode.decode_image(content[: int(len(content) * share)])


def test_what_is_no_image_is_named() -> None:
    with pytest.raises(BrokenImageError, match="no bytes"):
        decode.decode_image(b"")
    with pytest.raises(BrokenImageError, match="no image format known begins with 68 65 6c 6c 6f"):
        decode.decode_image(b"hello")


@settings(max_examples=150)
@given(st.sampled_from([JPEG, PNG]), st.data())
def test_damage_gives_an_image_or_a_reason(content: bytes, data: st.DataObject) -> None:
    """Bytes overwritten at random places, heads kept or not: never another exception, never a crash."""
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BrokenImageError):
        image = decode.decode_image(bytes(damaged), max_pixels=10**6)
        assert image.dtype == np.uint8
        assert image.ndim == 3


@pytest.mark.parametrize(("size", "factor"), [(224, 1), (100, 1), (60, 2), (30, 4), (15, 8)])
def test_small_views_are_decoded_coarsely(size: int, factor: int) -> None:
    source = decode.Source.read(JPEG)
    box = (20, 40, 130, 140)
    found, boxes = source.coarsest([box, (0, 0, 240, 301)], size)
    image = source.pixels(found)
    assert found == factor
    assert image.shape == (-(-240 // factor), -(-301 // factor), 3)
    for scaled, side in zip(boxes[0], box):
        assert abs(scaled - side / factor) <= 1
    rows, columns = 240 // factor, 301 // factor
    whole = decode.decode_image(JPEG)[:, : columns * factor].reshape(rows, factor, columns, factor, 3)
    assert np.abs(image[:, :columns] - whole.mean((1, 3))).mean() < 2.5  # what a coarser inverse DCT gives: block means


@given(st.integers(0, 239), st.integers(0, 300), st.sampled_from([2, 4, 8]), st.data())
def test_scaled_boxes_stay_inside(top: int, left: int, factor: int, data: st.DataObject) -> None:
    box = top, left, data.draw(st.integers(1, 240 - top)), data.draw(st.integers(1, 301 - left))
    height, width = -(-240 // factor), -(-301 // factor)
    t, x, h, w = decode._scaled([box], factor, height, width)[0]
    assert 0 <= t < t + h <= height
    assert 0 <= x < x + w <= width


def test_masks_are_labels() -> None:
    labels = np.random.default_rng(0).integers(0, 256, (20, 30)).astype(np.uint8)
    assert np.array_equal(decode.decode_mask(encoded(Image.fromarray(labels), "PNG")), labels)
    palette = Image.fromarray(labels)
    palette.putpalette([value % 256 for value in range(768)])
    assert np.array_equal(decode.decode_mask(encoded(palette, "PNG")), labels)
    wide = np.array([[0, 70], [300, 65535]], np.uint16)
    assert np.array_equal(decode.decode_mask(encoded(Image.fromarray(wide), "PNG")), wide)
    with pytest.raises(BrokenImageError, match="mask has mode RGB"):
        decode.decode_mask(PNG)
