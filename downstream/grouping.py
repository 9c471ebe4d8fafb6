"""From feature maps to segments: normalise, reduce, cluster, enlarge.

Owns: the order of these steps (facts of the protocol: arXiv 2410.13821, object discovery) and the choice of method.

B images, D channels, h x w tokens, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from downstream.kmeans import kmeans
from downstream.linkage import average_linkage
from downstream.pca import pca
from downstream.spectral import spectral

Method = Literal["linkage", "kmeans", "spectral"]


@dataclass(frozen=True)
class Grouping:
    """How tokens are grouped.

    Attributes:
        clusters: segments per image; more than there are tokens: each token is a segment.
        distance: cut of the dendrogram at this mean distance instead of at a number of clusters (linkage only).
        components: principal components kept per image; none: no reduction.
    """

    method: Method = "linkage"
    clusters: int = 4
    distance: float | None = None
    components: int | None = 128
    restarts: int = 3
    seed: int = 0


def tokens_of(maps: Tensor, grouping: Grouping) -> Tensor:
    """Maps [B, D, h, w] -> what is clustered, [B, h*w, d] float32: unit length over channels, then reduced.

    Raises:
        ValueError: features are not finite.
    """
    tokens = F.normalize(maps.float(), dim=1).flatten(2).mT
    if not bool(torch.isfinite(tokens.sum())):
        raise ValueError("features are not finite: the backbone diverged or its weights are damaged")
    return tokens if grouping.components is None else pca(tokens, grouping.components)


def group(maps: Tensor, grouping: Grouping) -> Tensor:
    """Segments [B, h, w] int64 from 0 (CPU) of feature maps [B, D, h, w].

    Raises:
        ValueError: features are not finite; the method cannot cut by distance.
    """
    return group_sweep(maps, grouping, [grouping.clusters])[0]


def group_sweep(maps: Tensor, grouping: Grouping, clusters: list[int]) -> list[Tensor]:
    """`group` for several numbers of clusters; linkage builds its dendrogram once."""
    images, _, height, width = maps.shape
    tokens = tokens_of(maps, grouping)
    if grouping.method == "linkage":
        tree = average_linkage(tokens)
        cuts = [tree.cut_at(grouping.distance) if grouping.distance is not None else tree.cut(k) for k in clusters]
    elif grouping.distance is not None:
        raise ValueError(f"{grouping.method} cannot cut by distance: use linkage")
    else:
        method = spectral if grouping.method == "spectral" else kmeans
        cuts = [method(tokens, k, restarts=grouping.restarts, seed=grouping.seed) for k in clusters]
    return [labels.view(images, height, width).cpu() for labels in cuts]


def enlarge(segments: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest enlargement of segments [B, h, w] to [B, H, W], as torch's `nearest` places it."""
    height, width = segments.shape[1:]
    rows = (torch.arange(size[0]) * height) // size[0]
    columns = (torch.arange(size[1]) * width) // size[1]
    return segments[:, rows[:, None], columns]
