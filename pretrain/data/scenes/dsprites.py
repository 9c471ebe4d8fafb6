"""Multi-dSprites: two to five sprites with occlusion, coloured on a grey background, 64 px.

After the set "multi_dsprites_colored_on_grayscale" of Kabra et al., "Multi-object datasets" (2019): squares, ellipses
and hearts of six sizes at 40 angles, colours and the grey drawn evenly. Later sprites lie on top; one that is hidden
altogether has no label, and the labels of the others close up.

B scenes; up to 5 objects.
"""

from __future__ import annotations

import numpy as np

from pretrain.data.counter import key, uniform

SIZE = 64  # pixels
MOST, FEWEST = 5, 2
SCALES = np.linspace(0.5, 1.0, 6)
ANGLES = 40
RADIUS = 14.0  # pixels from the middle of a sprite of scale 1 to its farthest point, about
PATCH = 32  # side of the square around a sprite's middle that holds all of it
PER_OBJECT = 8  # uniform numbers for each object


def _inside(kind: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points (u right, v up, in units of the sprite) lie inside; kind [B]: 0 square, 1 ellipse, 2 heart."""
    inside = (np.abs(u) <= 0.70) & (np.abs(v) <= 0.70)
    inside[kind == 1] = (u * u + (v / 0.55) ** 2 <= 1.0)[kind == 1]
    # The heart curve (x^2 + y^2 - 1)^3 = x^2 y^3, scaled and moved into the unit disc.
    x, y = 1.25 * u[kind == 2], 1.25 * v[kind == 2] + 0.12
    ring = x * x + y * y - 1.0
    inside[kind == 2] = ring * ring * ring <= x * x * (y * y * y)
    return inside


def render(seed: int, scenes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scenes int64 [B] -> images uint8 [B, 64, 64, 3], masks uint8 [B, 64, 64] with 1 to 5 from back to front."""
    numbers = uniform(key(seed, 0, scenes, 0, "multi-dsprites"), 2 + MOST * PER_OBJECT)
    count = FEWEST + (numbers[:, 0] * (MOST + 1 - FEWEST)).astype(np.int64)
    grey = (numbers[:, 1] * 256).astype(np.uint8)
    choices = numbers[:, 2:].reshape(-1, MOST, PER_OBJECT)
    mask = np.zeros((len(scenes), SIZE, SIZE), np.uint8)
    for number in range(MOST):
        scene, ys, xs = _sprite(choices[:, number])
        shown = (number < count)[scene]
        mask[scene[shown], ys[shown], xs[shown]] = number + 1
    colours = (choices[:, :, 5:8] * 256).astype(np.uint8)
    palette = np.concatenate([np.repeat(grey[:, None, None], 3, axis=2), colours], axis=1)  # [B, 1 + 5, 3]
    return palette[np.arange(len(mask))[:, None, None], mask], _compact(mask)


def _sprite(choice: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels (scene, y, x) of one sprite in each scene, from uniform [B, 8]: kind, scale, angle, y, x, colour."""
    kind = (choice[:, 0] * 3).astype(np.int64)
    scale = RADIUS * SCALES[(choice[:, 1] * len(SCALES)).astype(np.int64)][:, None, None]
    angle = (2 * np.pi / ANGLES * (choice[:, 2] * ANGLES).astype(np.int64))[:, None, None]
    middle = 0.2 * SIZE + 0.6 * SIZE * choice[:, 3:5]
    corner = np.clip(middle.astype(np.int64) - PATCH // 2, 0, SIZE - PATCH)  # a sprite's reach is below 16 pixels
    y, x = np.mgrid[:PATCH, :PATCH] + 0.5
    dy = (y + (corner - middle)[:, 0, None, None]) / scale
    dx = (x + (corner - middle)[:, 1, None, None]) / scale
    u, v = np.cos(angle) * dx + np.sin(angle) * dy, np.sin(angle) * dx - np.cos(angle) * dy
    scene, ys, xs = np.nonzero(_inside(kind, u, v))
    return scene, ys + corner[scene, 0], xs + corner[scene, 1]


def _compact(mask: np.ndarray) -> np.ndarray:
    """Labels 1, 2, ... without gaps, where a sprite is hidden by others: uint8 [B, H, W] -> the same."""
    present = np.stack([(mask == label).any(axis=(1, 2)) for label in range(1, MOST + 1)], axis=1)  # [B, 5]
    renumbered = np.concatenate([np.zeros((len(mask), 1), np.int64), np.cumsum(present, axis=1)], axis=1)
    return renumbered[np.arange(len(mask))[:, None, None], mask].astype(np.uint8)
