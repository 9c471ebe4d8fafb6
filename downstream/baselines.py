"""Trivial segmentations, scored beside every model: what needs no features at all.

Owns: k-means on colours, with and without positions; connected regions of one colour; one segment; and the ceiling of
a grid of tokens, which knows the truth. B images of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from downstream import kmeans, metrics
from downstream.samples import Scene

MAX_POINTS = 256  # pixels per cluster that k-means learns from
PIXEL_RESTARTS = 10


def colour(scene: Scene, clusters: int, *, seed: int = 0) -> Tensor:
    """k-means on the RGB values of pixels, in [0, 1]."""
    return _pixel_kmeans(scene.images, clusters, seed)


def colour_position(scene: Scene, clusters: int, *, seed: int = 0) -> Tensor:
    """k-means on RGB, x and y of pixels, all in [0, 1] with equal weight."""
    height, width = scene.images.shape[2:]
    rows, columns = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    places = torch.stack([columns, rows]).expand(len(scene.images), -1, -1, -1)
    return _pixel_kmeans(torch.cat([scene.images, places], dim=1), clusters, seed)


def components(scene: Scene, clusters: int, *, tolerance: float = 0.1) -> Tensor:
    """Connected regions: neighbours belong together when no colour channel differs by more than `tolerance`.

    The largest regions are kept; the others join the largest of all.
    """
    return torch.stack([_regions(image, clusters, tolerance) for image in scene.images.numpy()])


def one_segment(scene: Scene, clusters: int) -> Tensor:
    """The whole image as one segment."""
    return torch.zeros_like(scene.instances)


def grid_ceiling(scene: Scene, grid: tuple[int, int], *, foreground: bool) -> Tensor:
    """The truth as labels [B, h, w] of tokens: each takes the most frequent true label of its pixels.

    No strict bound of MBO: a segment may gain by tokens that its object does not fill by half.

    foreground: objects come before background, for scores that look at objects' pixels only (FG-ARI).
    """
    counts = metrics.by_token(scene.instances + 1, grid)[:, 1:]  # without ignored pixels
    if foreground:
        counts[:, 1:] *= scene.instances[0].numel()
    return counts.argmax(1).view(-1, *grid)


def grid_scores(scene: Scene, grid: tuple[int, int]) -> dict[str, Tensor]:
    """Scores of the grid's ceiling, each by the labels that suit it."""
    plain = metrics.score(scene.instances, grid_ceiling(scene, grid, foreground=False), scene.classes)
    objects = metrics.score(scene.instances, grid_ceiling(scene, grid, foreground=True), scene.classes)
    return plain | {name: objects[name] for name in ("fg_ari", "fg_ari_2")}


BASELINES: dict[str, Callable[[Scene, int], Tensor]] = {
    "colour": colour,
    "colour_position": colour_position,
    "components": components,
    "one_segment": one_segment,
}
TITLES = {
    "colour": "k-means on colour",
    "colour_position": "k-means on colour and position",
    "components": "connected regions of a colour",
    "one_segment": "one segment",
    "grid": "ceiling of the token grid",
}


def _pixel_kmeans(values: Tensor, clusters: int, seed: int) -> Tensor:
    images, channels, height, width = values.shape
    labels = []
    for image in values.permute(0, 2, 3, 1).reshape(images, -1, channels).numpy():
        rng = np.random.default_rng(seed)
        points = image if len(image) <= MAX_POINTS * clusters else rng.choice(image, MAX_POINTS * clusters, axis=0)
        centres = kmeans.train(points, min(clusters, len(points)), restarts=PIXEL_RESTARTS, seed=seed)
        labels.append(kmeans.assign(image, centres).reshape(height, width))
    return torch.from_numpy(np.stack(labels))


def _regions(image: np.ndarray, clusters: int, tolerance: float) -> Tensor:
    _, height, width = image.shape
    pixel = np.arange(height * width).reshape(height, width)
    across = np.abs(np.diff(image, axis=2)).max(0) <= tolerance
    down = np.abs(np.diff(image, axis=1)).max(0) <= tolerance
    start = np.concatenate([pixel[:, :-1][across], pixel[:-1][down]])
    end = np.concatenate([pixel[:, 1:][across], pixel[1:][down]])
    edges = sparse.coo_matrix((np.ones(len(start), dtype=bool), (start, end)), shape=(pixel.size, pixel.size))
    _, region = connected_components(edges, directed=False)
    by_size = np.argsort(-np.bincount(region), kind="stable")
    label = np.zeros(len(by_size), dtype=np.int64)
    kept = by_size[:clusters]
    label[kept] = np.arange(len(kept))
    return torch.from_numpy(label[region].reshape(height, width))
