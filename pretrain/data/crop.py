"""Cropping and antialiased resizing: one image on the host, or a batch of equal-sized images on any device.

Both follow torchvision's resize of a crop: bilinear, antialiased, edges of the crop not seen beyond. The host path is
torch's uint8 kernel; the batched one multiplies by matrices of the same weights in float32 and rounds, which differs
by at most one grey level.

Shapes: n images of H x W, b crops, S side of the output; a box is (top, left, height, width) in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


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
    pixels = (pixels @ columns.transpose(1, 2)[:, None]).round_()  # [b, 3, H, S]
    return (rows[:, None] @ pixels).round_().clamp_(0, 255).to(torch.uint8)
