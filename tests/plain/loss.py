"""NT-Xent with the whole (2N)^2 matrix ("SimCLR", arXiv 2002.05709)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def nt_xent(view0: Tensor, view1: Tensor, temperature: float) -> Tensor:
    """Two views [N, D] -> mean loss over the 2N anchors."""
    z = F.normalize(torch.cat([view0, view1]), dim=1)
    similarity = z @ z.t() / temperature
    similarity = similarity.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), float("-inf"))
    positives = torch.arange(len(z), device=z.device).roll(len(view0))
    return F.cross_entropy(similarity, positives)
