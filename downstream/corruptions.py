"""The 15 common corruptions of CIFAR-10-C at five severities, made here or read from the published arrays.

Owns: their definitions, with the constants of CIFAR-10-C for 32 pixels (packages carry those of ImageNet-C). Source:
Hendrycks, Dietterich, "Benchmarking neural network robustness to common corruptions and perturbations", arXiv
1903.12261, and the published behaviour, quirks included: "glass" copies pixels rather than swapping them.

Known differences from the published arrays: other random numbers; "frost" pastes a generated ice texture where the
published one pastes crops of photographs (mean and contrast are alike). Both are said in every result.

Shapes: one image [H, W, 3] uint8; inside, float64 in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from configs.errors import UserError
from downstream import weather
from downstream.blurs import bilinear, clipped_zoom, disk, gaussian, motion_blur

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]
Corruption = Callable[[Floats, int, np.random.Generator], Floats]

SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(image: Pixels, name: str, severity: int, *, seed: int, index: int) -> Pixels:
    """One corrupted image, a function of (seed, name, severity, index) and the image.

    Args:
        image: [H, W, 3] uint8.
        severity: 1 to 5.
        index: number of the image in its data set.
    """
    rng = np.random.default_rng((seed, NAMES.index(name), severity, index))
    result = CORRUPTIONS[name](image / 255.0, severity - 1, rng)
    return (np.clip(result, 0, 1) * 255 + 1e-9).astype(np.uint8)


def published(folder: Path, name: str, severity: int) -> tuple[Pixels, NDArray[np.int64]]:
    """Images [10000, 32, 32, 3] and labels of the published CIFAR-10-C arrays (NAME.npy, labels.npy).

    Raises:
        UserError: a file is missing or of another shape.
    """
    arrays = []
    for file in (folder / f"{name}.npy", folder / "labels.npy"):
        if not file.is_file():
            raise UserError(f"{file} is missing: CIFAR-10-C has NAME.npy for each corruption, and labels.npy")
        arrays.append(np.load(file, mmap_mode="r", allow_pickle=False))
    images, labels = arrays
    if images.ndim != 4 or images.shape[1:] != (32, 32, 3) or len(images) != len(labels) or len(images) % 5:
        raise UserError(f"{folder}/{name}.npy has shape {images.shape}; expected [5 * N, 32, 32, 3]")
    count = len(images) // 5
    rows = slice((severity - 1) * count, severity * count)
    return np.asarray(images[rows]), np.array(labels[rows], dtype=np.int64)


def every() -> Iterator[tuple[str, int]]:
    """All 75 pairs of corruption and severity."""
    for name in NAMES:
        for severity in SEVERITIES:
            yield name, severity


def _gaussian_noise(image: Floats, level: int, rng: np.random.Generator) -> Floats:
    return image + rng.normal(scale=(0.04, 0.06, 0.08, 0.09, 0.10)[level], size=image.shape)


def _shot_noise(image: Floats, level: int, rng: np.random.Generator) -> Floats:
    photons = (500, 250, 100, 75, 50)[level]
    return rng.poisson(image * photons) / photons


def _impulse_noise(image: Floats, level: int, rng: np.random.Generator) -> Floats:
    hit = rng.random(image.shape) < (0.01, 0.02, 0.03, 0.05, 0.07)[level]
    return np.where(hit, rng.random(image.shape) < 0.5, image)


def _defocus_blur(image: Floats, level: int, rng: np.random.Generator) -> Floats:
    radius, softness = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))[level]
    return ndimage.correlate(image, disk(radius, softness)[:, :, None], mode="mirror")


def _glass_blur(image: Floats, level: int, rng: np.random.Generator) -> Floats:
    sigma, passes = ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))[level]
    pixels = (gaussian(image, sigma) * 255).astype(np.uint8)
    height, width = image.shape[:2]
    for _ in range(passes):
        # Upward and to the left by 0 or 1; later pixels see what earlier ones did.
        steps = rng.integers(-1, 1, size=(height, width, 2)).tolist()
        for row in range(height - 1, 1, -1):
            for column in range(width - 1, 1, -1):
                right, down = steps[row][column]
                pixels[row, column] = pixels[row + down, column + right]
    return gaussian(pixels / 255.0, sigma)


def _motion_blur(image: Floats, level: int, rng: np.random.Generator) -> Floats:
    radius, sigma = ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5))[level]
    return motion_blur(image, radius, sigma, rng.uniform(-45, 45))


def _zoom_blur(image: Floats, level: int, rng: np.random.Generator) -> Floats:
    factors = np.arange(1, (1.06, 1.11, 1.16, 1.21, 1.26)[level], 0.01)
    return (image + sum(clipped_zoom(image, factor) for factor in factors)) / (len(factors) + 1)


def _brightness(image: Floats, level: int, rng: np.random.Generator) -> Floats:
    # Raises V of HSV, which scales the channels; black becomes grey.
    value = image.max(axis=2, keepdims=True)
    raised = np.clip(value + (0.05, 0.1, 0.15, 0.2, 0.3)[level], 0, 1)
    return np.where(value > 0, image * raised / np.maximum(value, 1e-12), raised)


def _contrast(image: Floats, level: int, rng: np.random.Generator) -> Floats:
    mean = image.mean(axis=(0, 1), keepdims=True)
    return (image - mean) * (0.75, 0.5, 0.4, 0.3, 0.15)[level] + mean


def _elastic_transform(image: Floats, level: int, rng: np.random.Generator) -> Floats:
    size = image.shape[0]
    constants = ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))[level]
    strength, smoothness, jitter = (size * constant for constant in constants)
    centre, third = np.array(image.shape[:2]) // 2, min(image.shape[:2]) // 3
    corners = np.array([centre + third, [centre[0] + third, centre[1] - third], centre - third], dtype=np.float64)
    moved = corners + rng.uniform(-jitter, jitter, size=corners.shape)
    # The affine map that takes the moved corners (x, y) back to the corners.
    back = np.linalg.solve(np.column_stack([moved, np.ones(3)]), corners)
    y, x = np.mgrid[: image.shape[0], : image.shape[1]].astype(np.float64)
    warped = bilinear(
        image, back[0, 1] * x + back[1, 1] * y + back[2, 1], back[0, 0] * x + back[1, 0] * y + back[2, 0], "mirror"
    )
    shifts = [
        strength * ndimage.gaussian_filter(rng.uniform(-1, 1, size=image.shape[:2]), smoothness, truncate=3)
        for _ in range(2)
    ]
    return bilinear(warped, y + shifts[1], x + shifts[0], "reflect")


def _pixelate(image: Floats, level: int, rng: np.random.Generator) -> Floats:
    height, width = image.shape[:2]
    share = (0.95, 0.9, 0.85, 0.75, 0.65)[level]
    small = _pil(image).resize((int(width * share), int(height * share)), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.BOX)) / 255.0


def _jpeg_compression(image: Floats, level: int, rng: np.random.Generator) -> Floats:
    file = BytesIO()
    _pil(image).save(file, "JPEG", quality=(80, 65, 58, 50, 40)[level])
    return np.asarray(Image.open(file)) / 255.0


def _pil(image: Floats) -> Image.Image:
    return Image.fromarray((image * 255 + 0.5).astype(np.uint8))


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": weather.snow,
    "frost": weather.frost,
    "fog": weather.fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}
NAMES = tuple(CORRUPTIONS)
