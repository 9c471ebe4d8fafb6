"""What is random in a view of an image: pure functions of (seed, epoch, sample, view).

Owns: the crop boxes and colour parameters of views, distributed as torchvision's RandomResizedCrop, ColorJitter,
RandomGrayscale, RandomHorizontalFlip and GaussianBlur draw them, and the transform that the loader's workers run.
Only additions, multiplications, divisions and square roots of doubles decide a box, each exactly rounded by IEEE 754,
so that boxes are equal on every machine, one by one or vectorised.

Shapes: V views, S side of a view, D draws for a crop, P colour parameters (columns below).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np

from configs.schema import Views
from pretrain.data import counter, crop, decode
from pretrain.data.fetch import Work

TRIES = 10

# Columns of the colour parameters. ORDER is an index into ORDERS, or -1 where the view is not jittered; SIGMA is the
# blur's in pixels, 0 without blur; FLIP and GREY are 0 or 1; HUE is a share of the colour circle, the rest factors.
FLIP, BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GREY, SIGMA = range(8)
NUM_COLOUR = 8
ORDERS: tuple[tuple[int, ...], ...] = tuple(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))


def exp(x: Any) -> Any:
    """e^x of floats or arrays in |x| < 3 by Taylor's series of x / 8, relative error < 1e-15: no libm involved."""
    y = x / 8
    result = y * 0.0 + 1.0
    for k in range(14, 0, -1):
        result = result * y / k + 1.0
    for _ in range(3):
        result = result * result
    return result


@dataclass(frozen=True)
class CropRange:
    """The distribution of crop boxes: torchvision's RandomResizedCrop(scale, ratio)."""

    scale: tuple[float, float]
    ratio: tuple[float, float]

    def draws(self, keys: np.ndarray) -> np.ndarray:
        """What is random in crops of images of any size: uint64 [...] -> float64 [..., 2 * TRIES + 2].

        TRIES times a share of the image's area and a ratio of the sides, then a place in the room that is left.
        """
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        draws = counter.uniform(keys, 2 * TRIES + 2)
        share, ratio = draws[..., 0 : 2 * TRIES : 2], draws[..., 1 : 2 * TRIES : 2]
        share[:] = self.scale[0] + (self.scale[1] - self.scale[0]) * share
        ratio[:] = exp(low + (high - low) * ratio)
        return draws

    def box(self, draws: Sequence[float], height: int, width: int) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the crop of one image."""
        for attempt in range(0, 2 * TRIES, 2):
            area = height * width * draws[attempt]
            w, h = round(math.sqrt(area * draws[attempt + 1])), round(math.sqrt(area / draws[attempt + 1]))
            if 0 < w <= width and 0 < h <= height:
                top, left = int(draws[-2] * (height - h + 1)), int(draws[-1] * (width - w + 1))
                return min(top, height - h), min(left, width - w), h, w
        return self._central(height, width)

    def boxes(self, draws: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """The same for many: float64 [n, 2 * TRIES + 2], image sizes [n] -> int64 [n, 4]."""
        height, width = np.asarray(heights)[:, None], np.asarray(widths)[:, None]
        share, ratio = draws[:, 0 : 2 * TRIES : 2], draws[:, 1 : 2 * TRIES : 2]
        area = height * width * share
        w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        first = fits.argmax(1)[:, None]
        w, h = (np.take_along_axis(side, first, 1).astype(np.int64) for side in (w, h))
        top = np.minimum((draws[:, -2:-1] * (height - h + 1)).astype(np.int64), height - h)
        left = np.minimum((draws[:, -1:] * (width - w + 1)).astype(np.int64), width - w)
        result = np.concatenate([top, left, h, w], 1)
        for row in np.flatnonzero(~fits.any(1)):
            result[row] = self._central(int(heights[row]), int(widths[row]))
        return result

    def _central(self, height: int, width: int) -> tuple[int, int, int, int]:
        """The largest central crop within the ratios, where no draw fitted."""
        w, h = width, height
        if width / height < min(self.ratio):
            h = round(width / min(self.ratio))
        elif width / height > max(self.ratio):
            w = round(height * max(self.ratio))
        h, w = max(1, min(h, height)), max(1, min(w, width))
        return (height - h) // 2, (width - w) // 2, h, w


def colour_params(views: Views, seed: int, epochs: Any, samples: Any, view: Any) -> np.ndarray:
    """Colour parameters float32 [..., P] in the broadcast shape of epochs, samples and view."""
    draws = counter.uniform(counter.key(seed, epochs, samples, view, "colour"), 10)
    params = np.empty((*draws.shape[:-1], NUM_COLOUR), np.float32)
    jittered = draws[..., 0] < views.jitter_p
    for column, strength, draw in zip((BRIGHTNESS, CONTRAST, SATURATION), views.jitter, (1, 2, 3)):
        least, most = max(0.0, 1 - strength), 1 + strength
        params[..., column] = np.where(jittered, least + (most - least) * draws[..., draw], 1)
    params[..., HUE] = np.where(jittered, views.jitter[3] * (2 * draws[..., 4] - 1), 0)
    params[..., ORDER] = np.where(jittered, np.floor(draws[..., 5] * len(ORDERS)), -1)
    params[..., FLIP] = draws[..., 6] < views.flip
    params[..., GREY] = draws[..., 7] < views.grey_p
    least, most = views.blur_sigma
    params[..., SIGMA] = np.where(draws[..., 8] < views.blur_p, least + (most - least) * draws[..., 9], 0)
    return params


@dataclass(frozen=True)
class SimclrTransform:
    """The host's part of the views of one sample: decode once, crop and resize `num_views` times.

    Picklable and pure: the same arguments give the same arrays in any process.
    """

    views: Views
    seed: int
    max_pixels: int = decode.MAX_PIXELS
    num_views: int = 2

    parts: ClassVar[tuple[str, ...]] = decode.IMAGE_PARTS
    """What is read of a sample."""

    @cached_property
    def crops(self) -> CropRange:
        """The distribution of the crops."""
        return CropRange(self.views.scale, self.views.ratio)

    def draws(self, epochs: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """What is random in the crops of samples: int64 [n] each -> float64 [n, V, D]."""
        view = np.arange(self.num_views)
        return self.crops.draws(counter.key(self.seed, epochs[:, None], samples[:, None], view, "crop"))

    def __call__(self, parts: Mapping[str, Any], draws: np.ndarray) -> Work:
        """Parts of a sample and its draws [V, D] -> {"images": uint8 [V, 3, S, S]}; colour follows on the device.

        Raises:
            BrokenImageError: there is no image, or it cannot be decoded.
        """
        source = decode.Source.of(parts, max_pixels=self.max_pixels)
        boxes = [self.crops.box(drawn, source.height, source.width) for drawn in draws.tolist()]
        return partial(self._views, source, *source.coarsest(boxes, self.views.size))

    def _views(self, source: decode.Source, factor: int, boxes: Sequence[decode.Box]) -> dict[str, np.ndarray]:
        return {"images": crop.resized_many(source.pixels(factor, passing=True), boxes, self.views.size)}
