"""Kernels and resampling that the corruptions are made of.

Shapes: images [H, W] or [H, W, 3], float64 in [0, 1].
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Floats = NDArray[np.float64]


def gaussian(image: Floats, sigma: float) -> Floats:
    """Gaussian blur of the two first axes, edges repeated, cut at 4 sigma."""
    return ndimage.gaussian_filter(image, (sigma, sigma) + (0,) * (image.ndim - 2), mode="nearest", truncate=4)


def disk(radius: float, softness: float) -> Floats:
    """A disk kernel [17, 17] of sum 1, its edge softened by a 3 x 3 Gaussian of sigma `softness`. radius <= 8."""
    y, x = np.mgrid[-8:9, -8:9]
    kernel = (x**2 + y**2 <= radius**2).astype(np.float64)
    weights = np.exp(-np.array([1.0, 0.0, 1.0]) / (2 * softness**2))
    weights /= weights.sum()
    kernel = ndimage.correlate1d(kernel / kernel.sum(), weights, axis=0, mode="mirror")
    return ndimage.correlate1d(kernel, weights, axis=1, mode="mirror")


def motion_blur(image: Floats, radius: int, sigma: float, angle: float) -> Floats:
    """Motion blur as ImageMagick defines it: a one-sided Gaussian of 2 radius + 1 taps along `angle` (degrees).

    Taps lie on whole pixels; beyond the edge the nearest pixel counts.
    """
    taps = np.arange(2 * radius + 1)
    weights = np.exp(-(taps**2) / (2 * sigma**2))
    weights /= weights.sum()
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    rows, columns = np.arange(image.shape[0]), np.arange(image.shape[1])
    result = np.zeros_like(image)
    for tap, weight in zip(taps.tolist(), weights.tolist(), strict=True):
        right, down = math.ceil(tap * cosine - 0.5), math.ceil(tap * sine - 0.5)
        at_rows = np.clip(rows + down, 0, image.shape[0] - 1)
        at_columns = np.clip(columns + right, 0, image.shape[1] - 1)
        result += weight * image[at_rows][:, at_columns]
    return result


def clipped_zoom(image: Floats, factor: float) -> Floats:
    """The middle of an image [H, W] or [H, W, 3] enlarged bilinearly by `factor` >= 1, at the image's own size."""
    size = image.shape[0]
    inner = math.ceil(size / factor)
    first = (size - inner) // 2
    part = image[first : first + inner, first : first + inner]
    large = ndimage.zoom(part, (factor, factor) + (1,) * (image.ndim - 2), order=1)
    trim = (large.shape[0] - size) // 2
    return large[trim : trim + size, trim : trim + size]


def bilinear(image: Floats, rows: Floats, columns: Floats, mode: str) -> Floats:
    """An image [H, W, 3] sampled at real positions [H, W]; `mode` as in scipy.ndimage."""
    channels = np.moveaxis(image, 2, 0)
    return np.stack([ndimage.map_coordinates(channel, (rows, columns), order=1, mode=mode) for channel in channels], 2)
