"""Shapes: two to four outlined triangles, squares, circles and diamonds, white on black, overlapping, 40 px.

After Reichert and Serre, "Neuronal synchrony in complex-valued deep networks", arXiv 1312.6115, and the 4Shapes set of
Loewe et al., arXiv 2204.02075. An object is its outline; pixels where outlines of two objects cross belong to both and
are marked 255 (ignore).

B scenes; up to 4 objects.
"""

from __future__ import annotations

import numpy as np

from pretrain.data.counter import key, uniform

SIZE = 40  # pixels
SIDE = 17  # pixels of the square that a shape fills
MOST, FEWEST = 4, 2
IGNORE = 255


def outlines() -> np.ndarray:
    """Triangle, square, circle, diamond as outlines of one pixel: bool [4, 17, 17]."""
    y, x = np.mgrid[:SIDE, :SIDE]
    middle = SIDE // 2
    solid = [
        2 * np.abs(x - middle) <= y,
        np.ones((SIDE, SIDE), bool),
        (y - middle) ** 2 + (x - middle) ** 2 <= (middle + 0.3) ** 2,
        np.abs(y - middle) + np.abs(x - middle) <= middle,
    ]
    return np.stack([_outline(shape) for shape in solid])


def _outline(solid: np.ndarray) -> np.ndarray:
    """Pixels of a solid shape with one of four neighbours outside."""
    padded = np.pad(solid, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return solid & ~inner


OUTLINES = outlines()


def render(seed: int, scenes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scenes int64 [B] -> images uint8 [B, 40, 40, 3], masks uint8 [B, 40, 40] (1 to 4, 255 where outlines cross)."""
    numbers = uniform(key(seed, 0, scenes, 0, "shapes"), 1 + 3 * MOST)
    count = FEWEST + (numbers[:, 0] * (MOST + 1 - FEWEST)).astype(np.int64)
    choices = numbers[:, 1:].reshape(-1, MOST, 3)
    mask = np.zeros((len(scenes), SIZE, SIZE), np.uint8)
    hits = np.zeros_like(mask)
    for number in range(MOST):
        which, y, x = choices[:, number].T
        stamp = OUTLINES[(which * len(OUTLINES)).astype(np.int64)] & (number < count)[:, None, None]
        scene, ys, xs = np.nonzero(stamp)
        ys += (y * (SIZE - SIDE + 1)).astype(np.int64)[scene]
        xs += (x * (SIZE - SIDE + 1)).astype(np.int64)[scene]
        mask[scene, ys, xs] = number + 1
        hits[scene, ys, xs] += 1
    image = np.repeat(np.where(hits > 0, 255, 0).astype(np.uint8)[..., None], 3, axis=3)
    mask[hits > 1] = IGNORE
    return image, mask
