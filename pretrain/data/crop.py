"""Cropping and antialiased resizing: one image on the host, or a batch of equal-sized images on any device.

Both follow torchvision's resize of a crop: bilinear, antialiased, edges of the crop not seen beyond. On the host
crop.cpp does it in about half the time of torch's uint8 kernel, which stands in where there is no compiler; the batched
one multiplies by matrices of the same weights in float32. They differ by at most one grey level; which one runs is
decided by the device and the machine, not by how samples come to it.

Shapes: n images of H x W, b crops, S side of the output; a box is (top, left, height, width) in pixels.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.data import native as cpp

MEMORY = ctypes.c_uint8 * 0  # what C gets of a writable array: where it lies


def resized_many(image: np.ndarray, boxes: Sequence[Sequence[int]], size: int) -> np.ndarray:
    """Boxes of an image, uint8 [H, W, 3] (rows may be apart), resized: uint8 [b, 3, S, S]."""
    library = native()
    if library is None:
        return np.stack([resized(image, box, size) for box in boxes])
    result = np.empty((len(boxes), 3, size, size), np.uint8)
    # Not numpy's `.ctypes`, nor arrays of boxes: they cost more than a small crop.
    chosen = struct.pack(f"{4 * len(boxes)}q", *chain.from_iterable(boxes))
    library.crop(_address(image), image.strides[0], chosen, len(boxes), size, MEMORY.from_buffer(result.data))
    return result


def resized_at(
    library: ctypes.CDLL, addresses: np.ndarray, strides: np.ndarray, boxes: np.ndarray, size: int
) -> np.ndarray:
    """A box of each of n images: addresses of first bytes, bytes from row to row, int64 [n]; boxes int64 [n, 4]."""
    result = np.empty((len(boxes), 3, size, size), np.uint8)
    library.crops(*map(_address, (addresses, strides, boxes)), len(boxes), size, _address(result))
    return result


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


@cache
def native() -> ctypes.CDLL | None:
    """crop.cpp; None where there is no compiler."""
    library = cpp.library(Path(__file__).with_name("crop.cpp"))
    if library is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        library.crop.argtypes = (pointer, number, pointer, number, number, pointer)
        library.crops.argtypes = (pointer, pointer, pointer, number, number, pointer)
    return library


def resized(image: np.ndarray, box: Sequence[int], size: int) -> np.ndarray:
    """The box of an image, uint8 [H, W, 3], resized to uint8 [3, S, S] (a view, channels last in memory)."""
    top, left, height, width = box
    pixels = torch.from_numpy(image[top : top + height, left : left + width])
    pixels = pixels.permute(2, 0, 1).unsqueeze(0)  # [1, 3, h, w], channels last
    if (height, width) != (size, size):
        pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
    return pixels[0].numpy()


def weights(start: Tensor, length: Tensor, extent: int, size: int) -> Tensor:
    """Matrices that resize [start, start + length) of `extent` pixels to `size`: float32 [b, S, extent], rows sum to 1.

    A triangle of half width max(scale, 1) around each output pixel's centre, cut at the ends of the range.
    """
    start, length = start.to(torch.float32)[:, None, None], length.to(torch.float32)[:, None, None]
    scale = length / size
    output = torch.arange(size, device=start.device, dtype=torch.float32)[None, :, None]
    pixel = torch.arange(extent, device=start.device, dtype=torch.float32)[None, None, :] - start  # [b, 1, extent]
    distance = (pixel + 0.5 - scale * (output + 0.5)) / scale.clamp(min=1)
    triangle = (1 - distance.abs()).clamp(min=0) * ((pixel >= 0) & (pixel < length))
    return triangle / triangle.sum(-1, keepdim=True)


def resized_batch(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Boxes [b, 4] of images uint8 [b, 3, H, W], each resized to S: uint8 [b, 3, S, S] on the images' device."""
    height, width = images.shape[-2:]
    rows = weights(boxes[:, 0], boxes[:, 2], height, size)  # [b, S, H]
    columns = weights(boxes[:, 1], boxes[:, 3], width, size)  # [b, S, W]
    pixels = images.to(torch.float32)
    pixels = pixels @ columns.transpose(1, 2)[:, None]  # [b, 3, H, S]
    return (rows[:, None] @ pixels).round_().clamp_(0, 255).to(torch.uint8)
