"""Snow, frost and fog, as corruptions of an image.

Sources as in corruptions.py. Frost is generated: the published photographs are not shipped.

Shapes: images [H, W, 3], float64 in [0, 1]; level 0 to 4.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from downstream.blurs import clipped_zoom, motion_blur

Floats = NDArray[np.float64]

_LUMA = np.array([0.299, 0.587, 0.114])


def snow(image: Floats, level: int, rng: np.random.Generator) -> Floats:
    """Flakes thrown in one direction and turned by half a circle, over a whitened image."""
    mean, spread, zoom, least, radius, sigma, keep = (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    )[level]
    flakes = clipped_zoom(rng.normal(mean, spread, size=image.shape[:2]), zoom)
    flakes = np.where(flakes < least, 0, np.clip(flakes, 0, 1))
    flakes = (flakes * 255).astype(np.uint8) / 255.0
    flakes = motion_blur(flakes, radius, sigma, rng.uniform(-135, -45))[..., None]
    white = np.maximum(image, (image @ _LUMA)[..., None] * 1.5 + 0.5)
    return keep * image + (1 - keep) * white + flakes + np.rot90(flakes, k=2)


def frost(image: Floats, level: int, rng: np.random.Generator) -> Floats:
    """Ice on the pane: a bright, bluish, streaky texture added to a dimmed image."""
    keep, share = ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))[level]
    return keep * image + share * ice(image.shape[0], image.shape[1], rng)


def fog(image: Floats, level: int, rng: np.random.Generator) -> Floats:
    """A cloud added, then the range of the image restored."""
    amount, decay = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))[level]
    size = 1 << (max(image.shape[:2]) - 1).bit_length()
    cloud = plasma(size, decay, rng)[: image.shape[0], : image.shape[1], None]
    largest = image.max()
    return (image + amount * cloud) * largest / (largest + amount)


def plasma(size: int, decay: float, rng: np.random.Generator) -> Floats:
    """A fractal cloud in [0, 1] by the diamond-square algorithm on a torus, [size, size]; size is a power of two.

    Each level adds noise of half-width wibble^2 to the mean of four neighbours and divides wibble by `decay`.
    """
    heights = np.zeros((size, size))
    step, wibble = size, 100.0
    while step >= 2:
        half = step // 2
        noise = [rng.uniform(-(wibble**2), wibble**2, size=(size // step, size // step)) for _ in range(3)]
        corners = heights[::step, ::step]
        across, down = np.roll(corners, -1, axis=1), np.roll(corners, -1, axis=0)
        middles = (corners + across + down + np.roll(across, -1, axis=0)) / 4 + noise[0]
        heights[half::step, half::step] = middles
        heights[::step, half::step] = (corners + across + middles + np.roll(middles, 1, axis=0)) / 4 + noise[1]
        heights[half::step, ::step] = (corners + down + middles + np.roll(middles, 1, axis=1)) / 4 + noise[2]
        step, wibble = half, wibble / decay
    heights -= heights.min()
    return heights / heights.max()


def ice(height: int, width: int, rng: np.random.Generator) -> Floats:
    """A texture of ice crystals, [height, width, 3]: noise stretched along random directions, ridged, tinted blue.

    Mean, tint and contrast are those of the published photographs at their size of use (means of .35 to .81, standard
    deviation inside a crop of 32 pixels .04 to .11).
    """
    field = np.zeros((height, width))
    for scale in (1, 2, 4):
        angle = rng.uniform(0, np.pi)
        noise = rng.normal(size=(height, width))
        along, across = 4.0 * scale, 0.7 * scale
        turned = ndimage.rotate(np.tile(noise, (3, 3)), np.degrees(angle), reshape=False, order=1, mode="wrap")
        streaks = ndimage.gaussian_filter(turned, (across, along), mode="wrap")[height : 2 * height, width : 2 * width]
        field += (1 - np.abs(streaks / streaks.std()).clip(0, 2)) * scale**0.5
    field = (field - field.mean()) / field.std()
    brightness = rng.uniform(0.35, 0.8) + 0.07 * field
    return np.clip(brightness[..., None] * np.array([0.88, 1.02, 1.1]), 0, 1)
