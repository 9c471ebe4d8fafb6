"""Up-tiling: features on a finer grid by looking at shifted copies of the image (arXiv 2410.13821, appendix).

Owns: the shifted crops and the interleaving of their features, for any backbone with a patch size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def shifted_crops(images: Tensor, *, patch: int, factor: int) -> Tensor:
    """Crops of the enlarged images, shifted by parts of a patch.

    The images are enlarged bicubically by patch - patch / factor pixels, which is the distance of the last shift.

    Args:
        images: [B, 3, H, W]. patch: side of a patch in pixels, a multiple of `factor`.

    Returns:
        [factor * factor, B, 3, H, W], shifts in row-major order.

    Raises:
        ValueError: factor does not divide the patch.
    """
    if factor < 1 or patch % factor:
        raise ValueError(f"up-tiling by {factor} needs a patch size that it divides, not {patch}")
    height, width = images.shape[-2:]
    step = patch // factor
    size = (height + patch - step, width + patch - step)
    large = F.interpolate(images, size=size, mode="bicubic", align_corners=False)
    return torch.stack(
        [
            large[..., row * step : row * step + height, column * step : column * step + width]
            for row in range(factor)
            for column in range(factor)
        ]
    )


def interleave(maps: Tensor, *, factor: int) -> Tensor:
    """Features [factor * factor, B, D, h, w] of the shifted crops -> [B, D, h * factor, w * factor]."""
    shifts, images, channels, height, width = maps.shape
    assert shifts == factor * factor
    maps = maps.view(factor, factor, images, channels, height, width)
    return maps.permute(2, 3, 4, 0, 5, 1).reshape(images, channels, height * factor, width * factor)
