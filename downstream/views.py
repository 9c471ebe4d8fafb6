"""Random crops and flips for probes that train on augmented copies of a data set.

Owns: SimCLR's evaluation augmentation (arXiv 2002.05709, appendix B.5: random resized crop and flip, no colour), keyed
by (seed, copy, position): the views of an image are the same at any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def crop_and_flip(images: Tensor, positions: Sequence[int], *, seed: int, copy: int) -> Tensor:
    """One view of each of the images [B, 3, S, S] in [0, 1], at the same size."""
    size = images.shape[-1]
    views = []
    for image, position in zip(images, positions):
        rng = np.random.default_rng((seed, copy, position))
        top, left, height, width = _box(size, rng)
        cut = image[None, :, top : top + height, left : left + width]
        view = F.interpolate(cut, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
        views.append(view.flip(3) if rng.random() < 0.5 else view)
    return torch.cat(views)


def _box(size: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop of a square; the square itself if ten tries fail."""
    for _ in range(10):
        area = size * size * rng.uniform(*SCALE)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        height, width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < height <= size and 0 < width <= size:
            return int(rng.integers(0, size - height + 1)), int(rng.integers(0, size - width + 1)), height, width
    return 0, 0, size, size
