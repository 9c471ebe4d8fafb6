"""Cropping and antialiased resizing: one image on the host, or a batch of equal-sized images on any device.

Both follow torchvision's resize of a crop: bilinear, antialiased, edges of the crop not seen beyond. The host path is
torch's uint8 kernel, and for small views, where its calls cost more than its arithmetic, crop.cpp. The batched one
multiplies by matrices of the same weights in float32. They differ by at most one grey level; which one runs is decided
by the size of a view and the device alone, not by how samples come to it.

Shapes: n images of H x W, b crops, S side of the output; a box is (top, left, height, width) in pixels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.data import native as cpp

# Views up to this side are made by crop.cpp. Measured on one core, crop of 20 x 25 to 32 px: 10 us against torch's 36;
# 250 x 300 to 224 px: 440 us against 366.
NATIVE_UP_TO = 64


def resized_many(images: Sequence[np.ndarray], boxes: Sequence[Sequence[int]], size: int) -> np.ndarray:
    """One box of each image, uint8 [H, W, 3] (rows may be apart), resized: uint8 [n, 3, S, S]."""
    library = native(size)
    if library is None:
        return np.stack([resized(image, box, size) for image, box in zip(images, boxes)])
    addresses = np.array([image.__array_interface__["data"][0] for image in images], np.int64)
    strides = np.array([image.strides[0] for image in images], np.int64)
    return resized_at(library, addresses, strides, np.asarray(boxes, np.int64), size)


def resized_at(
    library: ctypes.CDLL, addresses: np.ndarray, strides: np.ndarray, boxes: np.ndarray, size: int
) -> np.ndarray:
    """The same from addresses of first bytes and bytes from row to row, int64 [n], by crop.cpp."""
    result = np.empty((len(boxes), 3, size, size), np.uint8)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (addresses, strides, boxes)]
    library.crops(*pointers, ctypes.c_int64(len(boxes)), ctypes.c_int64(size), ctypes.c_void_p(result.ctypes.data))
    return result


def native(size: int) -> ctypes.CDLL | None:
    """crop.cpp, where it makes views of this size."""
    return cpp.library(Path(__file__).with_name("crop.cpp")) if size <= NATIVE_UP_TO else None


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
