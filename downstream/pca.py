"""Principal components of each image's tokens, for many images at once.

Owns: the reduction before clustering (arXiv 2410.13821: centred, no whitening, per image).

B images, N tokens, C channels, d components.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


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
    threads = torch.get_num_threads()
    if features.is_cuda or threads == 1 or len(features) < 2 * threads:
        return _project(features, components)
    # Small eigenproblems gain nothing from several threads each: a thread for each part of the batch.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return torch.cat(list(pool.map(lambda part: _project(part, components), features.chunk(threads))))
    finally:
        torch.set_num_threads(threads)


def _project(features: Tensor, components: int) -> Tensor:
    tokens, channels = features.shape[1:]
    centred = features - features.mean(1, keepdim=True)
    if channels <= tokens:
        axes = torch.linalg.eigh(centred.mT @ centred).eigenvectors[..., -components:]  # rising eigenvalues
        return centred @ axes
    values, vectors = torch.linalg.eigh(centred @ centred.mT)  # U S of the singular value decomposition
    return vectors[..., -components:] * values[:, None, -components:].clamp_min(0).sqrt()
