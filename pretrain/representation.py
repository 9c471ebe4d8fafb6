"""What embeddings look like while they are learned: alignment, uniformity, effective rank.

"Understanding Contrastive Representation Learning through Alignment and Uniformity on the Hypersphere", Wang and
Isola, arXiv 2005.10242:
    alignment  = mean |z_i - z_p|^2 over pairs of views                    0 (views coincide) .. 4
    uniformity = log mean exp(-2 |z_i - z_j|^2) over i != j                0 (all coincide) .. about -4
"The effective rank: a measure of effective dimensionality", Roy and Vetterli, EUSIPCO 2007:
    effective rank = exp(-sum p_k log p_k),  p = singular values / their sum        1 .. d

Legend: b images, d embedding size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

MOST = 1024  # images looked at: the cost is quadratic in them


@torch.no_grad()
def describe(embeddings: Tensor) -> dict[str, Tensor]:
    """Measures of embeddings [b, 2, d] of any scale, scalars on their device (a device sync, for the eigenvalues)."""
    z = F.normalize(embeddings[:MOST].float(), dim=-1)  # [b, 2, d]
    first, second = z.unbind(1)
    return {
        "alignment": (first - second).square().sum(1).mean(),
        "uniformity": uniformity(first),
        "effective_rank": effective_rank(first),
    }


def uniformity(z: Tensor) -> Tensor:
    """Of unit vectors [b, d], over pairs of different rows; 0 for a single row."""
    if len(z) < 2:
        return z.new_zeros(())
    squared = (2 - 2 * z @ z.T).clamp(min=0)
    squared.fill_diagonal_(torch.inf)
    return torch.logsumexp(-2 * squared.flatten(), 0) - torch.log(z.new_tensor(len(z) * (len(z) - 1.0)))


def effective_rank(z: Tensor) -> Tensor:
    """Of the matrix [b, d] as it is (not centred), from the eigenvalues of its smaller Gram matrix in fp64; NaN where
    it is not finite, which the solver would raise for."""
    z = z.double()
    gram = z.T @ z if z.shape[0] >= z.shape[1] else z @ z.T
    finite = gram.isfinite().all()
    values = torch.linalg.eigvalsh(torch.where(finite, gram, 0.0)).clamp(min=0).sqrt()
    p = values / values.sum().clamp(min=1e-12)
    return torch.where(finite, torch.exp(torch.special.entr(p).sum()), torch.nan).float()
