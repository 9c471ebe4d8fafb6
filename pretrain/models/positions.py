"""Where a token is: GTA matrices and additive 2-D encodings.

GTA: "GTA: A Geometry-Aware Attention Mechanism for Multi-View Transformers" (Miyato et al., arXiv 2310.10375), as AKOrN
(arXiv 2410.13821) uses it on a grid of tokens: every token carries one 2x2 matrix per pair of head channels. They start
as rotations, by the token's row for even pairs and by its column for odd ones, and are learned without constraint.

Legend: N = h*w tokens (row-major), D channels of a head, P = D/2 pairs, C channels of the state.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BASE = 10000.0


def _coordinates(grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Row and column of every token, float32 [N] each."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return rows.flatten().float(), columns.flatten().float()


def gta_rotations(grid: tuple[int, int], head_dim: int) -> Tensor:
    """The initial GTA matrices of q, k and v: float32 [2, 2, N, P], entry [i, j] of the matrix first.

    Pair 2f turns by row * 10000^(-f/F), pair 2f+1 by column * 10000^(-f/F), F = ceil(D/4). The matrix of the output is
    the transpose, so that at the start attention sees relative positions only.
    """
    if head_dim % 2:
        raise ValueError(f"GTA needs an even number of channels per head, not {head_dim}: change num_heads")
    num_frequencies = -(-head_dim // 4)
    frequencies = BASE ** (-torch.arange(num_frequencies, dtype=torch.float32) / num_frequencies)
    rows, columns = _coordinates(grid)
    angles = torch.stack([rows[:, None] * frequencies, columns[:, None] * frequencies], dim=-1)  # [N, F, 2]
    angles = angles.flatten(1)[:, : head_dim // 2]  # [N, P]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.stack([cos, -sin]), torch.stack([sin, cos])])


def sine_cosine(grid: tuple[int, int], dim: int) -> Tensor:
    """Additive 2-D encoding, float32 [N, C]: a quarter each of sin(row), cos(row), sin(column), cos(column)."""
    if dim % 4:
        raise ValueError(f"absolute positions need a multiple of 4 channels, not {dim}")
    frequencies = BASE ** (-torch.arange(dim // 4, dtype=torch.float32) / (dim // 4))
    rows, columns = (axis[:, None] * frequencies for axis in _coordinates(grid))
    return torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()], dim=1)


def resample_tokens(table: Tensor, old: tuple[int, int], new: tuple[int, int], *, dim: int) -> Tensor:
    """Bilinear interpolation of a table of positions over the grid (`align_corners=False`), along its token dimension.

    table: [..., N_old, ...] with the tokens at `dim`. Returns [..., N_new, ...]; the table itself when nothing changes.
    """
    if old == new:
        return table
    tokens_last = table.movedim(dim, -1)
    planes = tokens_last.reshape(1, -1, *old)
    resized = F.interpolate(planes, size=new, mode="bilinear", align_corners=False)
    return resized.reshape(*tokens_last.shape[:-1], new[0] * new[1]).movedim(-1, dim)
