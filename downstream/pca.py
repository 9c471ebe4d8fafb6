"""Principal components of each image's tokens, for many images at once.

Owns: the reduction before clustering (arXiv 2410.13821: centred, no whitening, per image).

B images, N tokens, C channels, d components.
"""

from __future__ import annotations

import torch
from torch import Tensor

from downstream.eigen import leading

_NUMBERS = 2**21  # features reduced at a time: bounds memory, which is then used again and again


def pca(features: Tensor, components: int) -> Tensor:
    """Project the tokens of each image on its first principal components.

    Where `components` cannot cut anything off (no more channels, or no more tokens than that), the features are
    returned as they are: the projection would only rotate them, and every distance stays.

    Args:
        features: [B, N, C] float. components: d.

    Returns:
        [B, N, min(d, C)] float32, rotated arbitrarily in sign and order of equal variances.
    """
    tokens, channels = features.shape[1:]
    features = features.float()
    if channels <= components or tokens - 1 <= components:
        return features
    at_once = max(1, _NUMBERS // (tokens * channels))
    return torch.cat([_project(part, components) for part in features.split(at_once)])


def _project(features: Tensor, components: int) -> Tensor:
    channels, tokens = features.shape[2], features.shape[1]
    centred = features - features.mean(1, keepdim=True)
    if channels < tokens:
        _, axes = leading(centred.mT @ centred, components)
        return centred @ axes
    values, vectors = leading(centred @ centred.mT, components)  # U S of the singular value decomposition
    return vectors * values[:, None].clamp_min(0).sqrt()
