"""Average linkage of many images at once, with the dendrograms of fastcluster.

Owns: calling the native kernel (linkage.cpp), or fastcluster where there is no compiler, and cutting dendrograms. The
kernel computes distances in float64 and keeps them in float32, as exact as the features are: labels equal fastcluster's
up to ties.

B images, N tokens, D features.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from downstream import native


@dataclass(frozen=True)
class Dendrogram:
    """Merges of each image in rising order, numbered as SciPy does: tokens 0..N-1, merge m makes cluster N + m.

    Attributes:
        children: [B, N-1, 2] int64. heights: [B, N-1] float64, mean distances at which clusters merged.
    """

    children: Tensor
    heights: Tensor

    def cut(self, num_clusters: int) -> Tensor:
        """Labels [B, N] int64 from 0 of `num_clusters` clusters (of N, where there are fewer tokens)."""
        tokens = self.heights.shape[1] + 1
        kept = max(tokens - num_clusters, 0)
        return self._labels(torch.full((len(self.heights), 1), kept))

    def cut_at(self, distance: float) -> Tensor:
        """Labels [B, N] int64 of the clusters that merged at no more than `distance`; their number varies by image."""
        return self._labels((self.heights <= distance).sum(1, keepdim=True))

    def _labels(self, kept: Tensor) -> Tensor:
        """Labels when the first `kept` [B, 1] merges of each image are carried out."""
        images, merges = self.heights.shape
        tokens = merges + 1
        parent = torch.arange(tokens + merges).repeat(images, 1)
        merge = torch.arange(merges)
        made = torch.where(merge < kept, tokens + merge, -1)[:, :, None].expand(-1, -1, 2)
        children = self.children.reshape(images, -1)
        parent.scatter_(1, children, torch.where(made >= 0, made, self.children).reshape(images, -1))
        while not torch.equal(above := parent.gather(1, parent), parent):  # doubles the steps each time
            parent = above
        roots = parent[:, :tokens]
        is_root = torch.zeros_like(parent).scatter_(1, roots, 1)
        return (is_root.cumsum(1) - 1).gather(1, roots)


def average_linkage(features: Tensor, *, threads: int | None = None) -> Dendrogram:
    """Dendrograms of average linkage (Euclidean) over the tokens of each image.

    Args:
        features: [B, N, D] on any device; taken as float32, distances are kept in float32.
        threads: images clustered at a time, each in about 5 N^2 bytes; default: torch's number of threads.

    Raises:
        ValueError: a feature is not finite.
    """
    if not bool(torch.isfinite(features.sum())) and bool((bad := ~torch.isfinite(features)).any()):
        broken = bad.flatten(1).any(1).nonzero().flatten().tolist()
        raise ValueError(f"features of images {broken[:8]} of the batch are not finite: the backbone diverged")
    images, tokens, _ = features.shape
    children = torch.empty(images, tokens - 1, 2, dtype=torch.int32)
    heights = torch.empty(images, tokens - 1, dtype=torch.float64)
    if tokens == 1 or not images:
        return Dendrogram(children.long(), heights)
    kernel = native.library("linkage")
    if kernel is None:
        return _by_fastcluster(features)
    points = features.to("cpu", torch.float32).contiguous()
    pointers = [ctypes.c_void_p(one.data_ptr()) for one in (points, children, heights)]
    sizes = [ctypes.c_int64(size) for size in (*points.shape, threads or torch.get_num_threads())]
    kernel.average_linkage(pointers[0], *sizes[:3], *pointers[1:], sizes[3])
    return Dendrogram(children.long(), heights)


def _by_fastcluster(features: Tensor) -> Dendrogram:
    """The same by fastcluster, one image at a time."""
    import fastcluster

    trees = np.stack([fastcluster.linkage(image, "average") for image in features.double().cpu().numpy()])
    return Dendrogram(torch.from_numpy(trees[:, :, :2].astype(np.int64)), torch.from_numpy(trees[:, :, 2].copy()))
