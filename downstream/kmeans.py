"""k-means by faiss: the tokens of each image by themselves, or those of a whole data set (a codebook).

Owns: seeds (k-means++), restarts, and the treatment of images with fewer distinct tokens than clusters.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

ITERATIONS = 25


def kmeans(features: Tensor, clusters: int, *, restarts: int = 3, seed: int = 0) -> Tensor:
    """Cluster the tokens of each image; the restart with the least inertia counts.

    Args:
        features: [B, N, D] float.

    Returns:
        [B, N] int64 labels from 0. The labels of an image do not depend on the images beside it.
    """
    labels = []
    for image in features.float().cpu().numpy():
        k = min(clusters, len(image))
        centres = train(image, k, restarts=restarts, seed=seed)
        labels.append(assign(image, centres))
    return torch.from_numpy(np.stack(labels))


def train(points: np.ndarray, clusters: int, *, restarts: int = 1, seed: int = 0) -> np.ndarray:
    """Centres [clusters, D] float32 of points [N, D]; needs N >= clusters."""
    import faiss

    points = np.ascontiguousarray(points, dtype=np.float32)
    if clusters == 1:
        return points.mean(0, keepdims=True)
    search = faiss.Kmeans(
        points.shape[1], clusters, niter=ITERATIONS, nredo=restarts, seed=seed + 1,
        init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
        min_points_per_centroid=1, max_points_per_centroid=max(256, -(-len(points) // clusters)),
        gpu=faiss.get_num_gpus() > 0 and len(points) > 100_000,
    )  # fmt: skip
    search.train(points)
    return np.asarray(search.centroids)


def assign(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Nearest centre of each point, [N] int64."""
    import faiss

    _, nearest = faiss.knn(np.ascontiguousarray(points, dtype=np.float32), centres, 1)
    return nearest[:, 0]
