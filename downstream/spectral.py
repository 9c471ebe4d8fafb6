"""Spectral clustering of each image's tokens (normalised cut).

Owns: Ng, Jordan, Weiss, "On spectral clustering: analysis and an algorithm" (NIPS 2001), on an affinity of cosines:
A_ij = exp((cos_ij - 1) / temperature), taken from distances (|x - y|^2 = 2 - 2 cos for tokens of unit length), which
principal components keep although they centre the tokens. The k first eigenvectors of D^-1/2 A D^-1/2, rows
normalised, go to k-means.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from downstream.kmeans import kmeans


def spectral(features: Tensor, clusters: int, *, temperature: float = 0.2, restarts: int = 3, seed: int = 0) -> Tensor:
    """Labels [B, N] int64 of tokens [B, N, D] of unit length, or of their principal components.

    Cost: an eigendecomposition of [N, N] an image.
    """
    features = features.double()
    affinity = (-torch.cdist(features, features).square() / (2 * temperature)).exp()
    scale = affinity.sum(-1).rsqrt()
    laplacian = affinity * scale[:, :, None] * scale[:, None, :]
    vectors = torch.linalg.eigh(laplacian).eigenvectors[..., -min(clusters, features.shape[1]) :]
    return kmeans(F.normalize(vectors, dim=-1), clusters, restarts=restarts, seed=seed)
