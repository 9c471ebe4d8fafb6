"""J of the Kuramoto equation: what oscillators at other positions say to each other.

"Artificial Kuramoto Oscillatory Neurons" (arXiv 2410.13821): sum_j J_ij x_j is multi-head self-attention, with GTA
matrices (positions.py) on queries, keys, values and output, or a convolution with same padding.

Every connectivity is called as `coupling(x, grid, positions)` with `positions = coupling.positions(grid)`, which is
computed once per layer and forward and reused by all T steps.

Legend: B images, N = h*w tokens, C channels, H heads, D = C/H, P = D/2 pairs.
Layout of the projections: head slowest, then the two components of a GTA pair as halves, then the pair: (H, 2, P).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.kernels import native
from pretrain.models.positions import gta_rotations, resample_tokens

Grid = tuple[int, int]
Positions = tuple[Tensor, Tensor] | None


def apply_pairs(matrices: Tensor, u: Tensor) -> Tensor:
    """Multiply channel pairs by 2x2 matrices: matrices [2, 2, ...], u [..., 2, P] with pair components in planes."""
    u0, u1 = u.unbind(-2)
    return torch.stack([matrices[0, 0] * u0 + matrices[0, 1] * u1, matrices[1, 0] * u0 + matrices[1, 1] * u1], dim=-2)


class Coupling(nn.Module):
    """A connectivity. Base of all: J = 0, the control in which every oscillator follows its own stimulus."""

    kernel = "plain"  # or "native", where that runs

    def init_weights(self) -> None:
        """No parameters."""

    def positions(self, grid: Grid) -> Positions:
        """What `forward` needs to know about a grid; computed once per layer and forward."""
        return None

    def set_grid(self, grid: Grid) -> None:
        """Store what is kept by position for another grid from now on."""

    def runs_natively(self, x: Tensor, n: int = 1) -> bool:
        """Whether the native kernel takes this coupling, of oscillators of n components, on an input like x."""
        return False

    def forward(self, x: Tensor, grid: Grid, positions: Positions) -> Tensor:
        """x [B, N, C] -> sum_j J_ij x_j [B, N, C]."""
        return torch.zeros_like(x)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention softmax(q k' / sqrt D) v, [B, H, N, D] each.

    The CPU's fused kernel spends most of a bf16 training step in its backward: two plain products are faster there.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad:
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return weights.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class AttentionCoupling(Coupling):
    """Multi-head self-attention, with or without GTA.

    Args:
        dim: channels C, a multiple of `num_heads`.
        num_heads: heads H.
        grid: tokens (rows, columns) for which the GTA matrices are stored; others are interpolated. None: no GTA.
    """

    def __init__(self, dim: int, num_heads: int, grid: Grid | None) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim {dim} is no multiple of num_heads {num_heads}")
        self.dim, self.num_heads, self.head_dim, self.grid = dim, num_heads, dim // num_heads, grid
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        if grid is not None:
            num_tokens = grid[0] * grid[1]
            self.gta_in = nn.Parameter(torch.empty(2, 2, num_tokens, 3, self.head_dim // 2))  # of q, k, v
            self.gta_out = nn.Parameter(torch.empty(2, 2, num_tokens, self.head_dim // 2))

    def init_weights(self) -> None:
        """GTA as rotations by row and column (linear layers as PyTorch has them)."""
        if self.grid is not None:
            rotations = gta_rotations(self.grid, self.head_dim)
            with torch.no_grad():
                self.gta_in.copy_(rotations[:, :, :, None].expand_as(self.gta_in))
                self.gta_out.copy_(rotations.transpose(0, 1))

    def positions(self, grid: Grid) -> Positions:
        """GTA matrices for a grid: of q, k, v [2, 2, N, 3, 1, P], of the output [2, 2, N, 1, P]; None without GTA."""
        if self.grid is None:
            return None
        gta_in = resample_tokens(self.gta_in, self.grid, grid, dim=2)
        gta_out = resample_tokens(self.gta_out, self.grid, grid, dim=2)
        return gta_in.unsqueeze(4), gta_out.unsqueeze(3)

    def set_grid(self, grid: Grid) -> None:
        """Store the GTA matrices for another grid from now on, interpolated from the present ones."""
        if self.grid is None or self.grid == grid:
            return
        with torch.no_grad():
            for name in ("gta_in", "gta_out"):
                table = resample_tokens(getattr(self, name), self.grid, grid, dim=2)
                setattr(self, name, nn.Parameter(table.contiguous(), requires_grad=getattr(self, name).requires_grad))
        self.grid = grid

    def no_weight_decay(self) -> set[str]:
        """GTA matrices: near rotations, which decay would shrink."""
        return set() if self.grid is None else {"gta_in", "gta_out"}

    def runs_natively(self, x: Tensor, n: int = 1) -> bool:
        return native.attends(self, x, n)

    def forward(self, x: Tensor, grid: Grid, positions: Positions) -> Tensor:
        """x [B, N, C] -> sum_j J_ij x_j [B, N, C]."""
        if self.kernel == "native" and self.runs_natively(x):
            return native.couple(self, x, positions)
        B, N, C = x.shape
        qkv = self.qkv(x.to(self.qkv.weight.dtype)).view(B, N, 3, self.num_heads, self.head_dim)
        if positions is not None:
            pairs = qkv.unflatten(-1, (2, self.head_dim // 2))  # [B, N, 3, H, 2, P]
            qkv = apply_pairs(positions[0].to(qkv.dtype), pairs).flatten(-2)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, N, D]
        y = attend(q, k, v).transpose(1, 2)  # [B, N, H, D]
        if positions is not None:
            pairs = y.unflatten(-1, (2, self.head_dim // 2))
            y = apply_pairs(positions[1].to(y.dtype), pairs).flatten(-2)
        return self.out(y.reshape(B, N, C))


class ConvCoupling(Coupling):
    """A convolution with same padding over the grid of tokens; its receptive field grows with every step."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {kernel_size} must be odd, so that a token sits at the centre")
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor, grid: Grid, positions: Positions) -> Tensor:
        """x [B, N, C] -> sum_j J_ij x_j [B, N, C]."""
        planes = x.to(self.conv.weight.dtype).transpose(1, 2).unflatten(2, grid)  # [B, C, h, w], channels last
        return self.conv(planes).flatten(2).transpose(1, 2)


def make_coupling(kind: str, dim: int, *, num_heads: int, grid: Grid | None, kernel_size: int) -> Coupling:
    """The connectivity named `kind`: "attn", "conv" or "none"."""
    if kind == "attn":
        return AttentionCoupling(dim, num_heads, grid)
    if kind == "conv":
        return ConvCoupling(dim, kernel_size)
    if kind == "none":
        return Coupling()
    raise ValueError(f"coupling {kind!r} is unknown: attn, conv or none")
