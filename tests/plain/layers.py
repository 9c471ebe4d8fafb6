"""Equations of arXiv 2410.13821 on [B, C, H, W], C = K*n with the component n fastest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def split(x: Tensor, n: int) -> Tensor:
    """[B, K*n, H, W] -> [B, K, n, H, W]."""
    return x.unflatten(1, (-1, n))


def unit(x: Tensor, n: int) -> Tensor:
    """Every oscillator to norm 1."""
    return F.normalize(split(x, n), dim=2).flatten(1, 2)


def token_rotations(rows: int, columns: int, head_dim: int) -> Tensor:
    """Rotations by row and column, pair by pair: [rows*columns, head_dim/2, 2, 2]."""
    count = (head_dim + 3) // 4
    matrices = torch.zeros(rows * columns, head_dim // 2, 2, 2)
    for row in range(rows):
        for column in range(columns):
            for pair in range(head_dim // 2):
                coordinate = row if pair % 2 == 0 else column
                angle = torch.tensor(coordinate * 10000.0 ** (-2 * (pair // 2) / (2 * count)))
                cos, sin = torch.cos(angle), torch.sin(angle)
                matrices[row * columns + column, pair] = torch.stack(
                    [torch.stack([cos, -sin]), torch.stack([sin, cos])]
                )
    return matrices


class Attention(nn.Module):
    """Self-attention by 1x1 convolutions; the head is the fastest channel index. GTA matrices of `grid`, or none."""

    def __init__(self, ch: int, heads: int, grid: tuple[int, int] | None) -> None:
        super().__init__()
        self.heads, self.grid = heads, grid
        self.W_qkv = nn.Conv2d(ch, 3 * ch, 1)
        self.W_o = nn.Conv2d(ch, ch, 1)
        if grid is not None:
            matrices = token_rotations(*grid, ch // heads)
            self.mat_q = nn.Parameter(matrices.clone())
            self.mat_k = nn.Parameter(matrices.clone())
            self.mat_v = nn.Parameter(matrices.clone())
            self.mat_o = nn.Parameter(matrices.transpose(2, 3).clone())

    def _turn(self, matrices: Tensor, u: Tensor, size: torch.Size) -> Tensor:
        """2x2 matrices per token on consecutive channel pairs of u [B, heads, N, D]."""
        assert self.grid is not None
        if tuple(size) != self.grid:
            planes = matrices.flatten(1).t().unflatten(1, self.grid)[None]
            planes = F.interpolate(planes, size=tuple(size), mode="bilinear", align_corners=False)
            matrices = planes[0].flatten(1).t().unflatten(1, (-1, 2, 2))
        pairs = u.unflatten(-1, (-1, 2))
        return torch.einsum("npij,bhnpj->bhnpi", matrices, pairs).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        q, k, v = (u.unflatten(1, (-1, self.heads)).flatten(3).permute(0, 2, 3, 1) for u in self.W_qkv(x).chunk(3, 1))
        if self.grid is not None:
            q, k, v = (self._turn(m, u, size) for m, u in ((self.mat_q, q), (self.mat_k, k), (self.mat_v, v)))
        y = F.scaled_dot_product_attention(q, k, v)  # [B, heads, N, D]
        if self.grid is not None:
            y = self._turn(self.mat_o, y, size)
        return self.W_o(y.permute(0, 3, 1, 2).flatten(1, 2).unflatten(2, tuple(size)))


class Frequencies(nn.Module):
    """Omega: the norm of a 2-vector per pair of channels, or of one for all."""

    def __init__(self, ch: int, *, shared: bool, init: float) -> None:
        super().__init__()
        self.omg_param = nn.Parameter(torch.full((2,) if shared else (ch // 2, 2), init / 2**0.5))

    def forward(self, x: Tensor) -> Tensor:
        w = torch.linalg.vector_norm(self.omg_param, dim=-1)
        pairs = x.unflatten(1, (-1, 2))
        w = w[None, :, None, None] if w.ndim else w
        return torch.stack([w * pairs[:, :, 1], -w * pairs[:, :, 0]], dim=2).flatten(1, 2)


class ScaleBias(nn.Module):
    """A scale and a bias per channel."""

    def __init__(self, ch: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(ch))
        self.bias = nn.Parameter(torch.zeros(ch))

    def forward(self, c: Tensor) -> Tensor:
        return c * self.scale[:, None, None] + self.bias[:, None, None]


def stimulus_norm(kind: str, ch: int, n: int) -> nn.Module:
    """`gn`, `sandb` or none."""
    if kind == "gn":
        return nn.GroupNorm(ch // n, ch)
    return ScaleBias(ch) if kind == "sandb" else nn.Identity()


class KLayer(nn.Module):
    """T Kuramoto steps. `omg` None: the published code then adds x itself."""

    def __init__(self, n: int, ch: int, connectivity: nn.Module, c_norm: str, omg: nn.Module | None, project: bool):
        super().__init__()
        self.n, self.project = n, project
        self.connectivity = connectivity
        self.c_norm = stimulus_norm(c_norm, ch, n)
        self.omg = omg

    def forward(self, x: Tensor, c: Tensor, T: int, gamma: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Returns the final x, x after each step, and the energies [T+1] of [B]."""
        n = self.n
        c, x = self.c_norm(c), unit(x, n)
        states, energies = [], [x.new_zeros(len(x))]
        for _ in range(T):
            y = c + self.connectivity(x)
            inner = (split(x, n) * split(y, n)).sum(2, keepdim=True)  # <x, y> per oscillator
            energies.append(-inner.sum((1, 2, 3, 4)))
            drift = (split(y, n) - inner * split(x, n)).flatten(1, 2) if self.project else y
            drift = drift + (x if self.omg is None else self.omg(x))
            x = unit(x + gamma * drift, n)
            states.append(x)
        return x, states, energies


class Norms(nn.Module):
    """Readout: a convolution to n values per channel, their norm, a bias."""

    def __init__(self, ch: int, n: int, ksize: int = 1) -> None:
        super().__init__()
        self.n = n
        self.invconv = nn.Conv2d(ch, ch * n, ksize, padding=ksize // 2)
        self.bias = nn.Parameter(torch.zeros(ch))

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(split(self.invconv(x), self.n), dim=2) + self.bias[:, None, None]
