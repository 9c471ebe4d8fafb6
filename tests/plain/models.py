"""AKOrN, ItrSA, the Sudoku model and the classifier on [B, C, H, W], arguments under their published names."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.plain.layers import Attention, Frequencies, KLayer, Norms


def each(value: Any, depth: int) -> list[Any]:
    """One value per layer."""
    return list(value) if isinstance(value, list | tuple) else [value] * depth


def sine_cosine(ch: int, rows: int, columns: int) -> Tensor:
    """2-D encoding [ch, rows, columns]."""
    out = torch.zeros(ch, rows, columns)
    quarter = ch // 4
    for i in range(quarter):
        rate = 10000.0 ** (-i / quarter)
        row, column = torch.arange(rows) * rate, torch.arange(columns) * rate
        out[i], out[quarter + i] = row.sin()[:, None], row.cos()[:, None]
        out[2 * quarter + i], out[3 * quarter + i] = column.sin()[None], column.cos()[None]
    return out


def resize(table: Tensor, size: torch.Size) -> Tensor:
    """A table [C, h, w] at another grid."""
    return F.interpolate(table[None], size=tuple(size), mode="bilinear", align_corners=False)[0]


class Projector(nn.Sequential):
    """Pool, Linear, ReLU, Linear under the published indices."""

    def __init__(self, ch: int, first: nn.Module, *, maxpool: bool) -> None:
        pool = nn.AdaptiveMaxPool2d(1) if maxpool else nn.AdaptiveAvgPool2d(1)
        super().__init__(first, pool, nn.Flatten(), nn.Linear(ch, 4 * ch), nn.ReLU(), nn.Linear(4 * ch, ch))


class AKOrN(nn.Module):
    """The image model. `forward(images in [0,1], start [B, K, n, h, w])` -> dict of all that golden files record."""

    def __init__(
        self, n: int, ch: int, L: int, T: Any, psize: int, imsize: int, J: Any = "attn", gta: bool = True,
        ksize: Any = 1, c_norm: str = "gn", gamma: float = 1.0, use_omega: bool = False, global_omg: bool = False,
        init_omg: float = 1.0, learn_omg: bool = True, use_ro_x: bool = False, maxpool: bool = True,
        project: bool = True, heads: int = 8, autorescale: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.n, self.T, self.imsize, self.autorescale = n, each(T, L), imsize, autorescale
        side = imsize // psize
        self.patchfy = nn.Sequential(nn.Identity(), nn.Conv2d(3, ch, psize, psize))
        self.gamma = nn.Parameter(torch.tensor([gamma]), requires_grad=False)
        self.layers = nn.ModuleList()
        for i, (kind, size) in enumerate(zip(each(J, L), each(ksize, L), strict=True)):
            coupling = (
                Attention(ch, heads, (side, side) if gta else None)
                if kind == "attn"
                else nn.Conv2d(ch, ch, size, padding=size // 2)
            )
            omg = Frequencies(ch, shared=global_omg, init=init_omg) if use_omega else None
            if omg is not None:
                omg.omg_param.requires_grad_(learn_omg)
            parts = [KLayer(n, ch, coupling, c_norm, omg, project), Norms(ch, n)]
            if use_ro_x and i < L - 1:
                parts.append(nn.Conv2d(ch, ch, 1))
            self.layers.append(nn.ModuleList(parts))
        if not gta:
            self.pemb_c = nn.Parameter(sine_cosine(ch, side, side))
            self.pemb_x = nn.Parameter(sine_cosine(ch, side, side))
        self.out = Projector(ch, nn.Identity(), maxpool=maxpool)

    def forward(self, images: Tensor, start: Tensor) -> dict[str, Any]:
        if self.autorescale and images.shape[2:] != (self.imsize, self.imsize):
            images = F.interpolate(images, size=(self.imsize, self.imsize), mode="bilinear", align_corners=False)
        c, x = self.patchfy((images - 0.5) / 0.5), start.flatten(1, 2)
        if hasattr(self, "pemb_c"):
            c, x = c + resize(self.pemb_c, c.shape[2:]), x + resize(self.pemb_x, c.shape[2:])
        seen: dict[str, Any] = {}
        for i, (layer, T) in enumerate(zip(self.layers, self.T, strict=True)):
            x, states, energies = layer[0](x, c, T, self.gamma)
            seen[f"layer{i}.oscillators_step1"] = states[0].unflatten(1, (-1, self.n))
            seen[f"layer{i}.oscillators_final"] = x.unflatten(1, (-1, self.n))
            seen[f"layer{i}.energy"] = torch.stack([e.expand(len(x)) for e in energies])
            c = layer[1](x)
            x = layer[2](x) if len(layer) == 3 else x
        return {**seen, "readout": c, "output": self.out(c)}


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of a map."""

    def __init__(self, ch: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, ch, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, ch, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
        return (x - mean) / torch.sqrt(var + 1e-5) * self.gamma + self.beta


class ItrSABlock(nn.Module):
    """T times attention with the same weights, then an MLP; pre-norm, residual."""

    def __init__(self, ch: int, heads: int, mlp_dim: int, grid: tuple[int, int] | None) -> None:
        super().__init__()
        self.layernorm1, self.layernorm2 = ChannelNorm(ch), ChannelNorm(ch)
        self.attn = Attention(ch, heads, grid)
        self.mlp = nn.Sequential(nn.Conv2d(ch, mlp_dim, 1), nn.GELU(), nn.Conv2d(mlp_dim, ch, 1))

    def forward(self, x: Tensor, T: int) -> Tensor:
        for _ in range(T):
            x = x + self.attn(self.layernorm1(x))
        return x + self.mlp(self.layernorm2(x))


class ItrSA(nn.Module):
    """The control; T = 1 is a ViT. `forward(images in [0,1])` -> features and output."""

    def __init__(
        self, imsize: int, psize: int, ch: int, blocks: int, heads: int, mlp_dim: int, T: int, gta: bool
    ) -> None:
        super().__init__()
        side = imsize // psize
        self.T = T
        self.patchfy = nn.Sequential(nn.Identity(), nn.Conv2d(3, ch, psize, psize))
        grid = (side, side) if gta else None
        self.transformer_encoder = nn.ModuleList(ItrSABlock(ch, heads, mlp_dim, grid) for _ in range(blocks))
        if not gta:
            self.pos_embed = nn.Parameter(sine_cosine(ch, side, side))
        self.out = Projector(ch, ChannelNorm(ch), maxpool=True)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.patchfy((images - 0.5) / 0.5)
        if hasattr(self, "pos_embed"):
            x = x + resize(self.pos_embed, x.shape[2:])
        for block in self.transformer_encoder:
            x = block(x, self.T)
        return {"features": x, "output": self.out(x)}


class Wrap(nn.Module):
    """Puts `fn.` before the names of a module, and adds its input to its output if told."""

    def __init__(self, fn: nn.Module, *, residual: bool = False) -> None:
        super().__init__()
        self.fn, self.residual = fn, residual

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fn(x) if self.residual else self.fn(x)


def activated(norm: nn.Module, conv: nn.Module) -> Wrap:
    """Norm, ReLU, convolution."""
    return Wrap(nn.Sequential(norm, nn.ReLU(), conv))


def refinement(ch: int, ksize: int, norm: str) -> list[nn.Module]:
    """A residual pair of activated convolutions, and one more without residual."""

    def part() -> Wrap:
        bn = nn.BatchNorm2d(ch) if norm == "bn" else nn.Identity()
        return activated(bn, nn.Conv2d(ch, ch, ksize, padding=ksize // 2))

    return [Wrap(Wrap(nn.Sequential(part(), part())), residual=True), part()]


class Sudoku(nn.Module):
    """The Sudoku model. `forward(puzzle [B, 9, 9, 9] one-hot, given [B, 9, 9, 1], noise [B, K, n, 9, 9])`."""

    def __init__(
        self, n: int, ch: int, T: int, heads: int, L: int = 1, J: str = "attn", use_omega: bool = True,
        global_omg: bool = True, init_omg: float = 0.5, learn_omg: bool = True, gamma: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        assert J == "attn"
        self.n, self.T = n, each(T, L)
        self.embedding = nn.Embedding(10, ch)
        self.gamma = nn.Parameter(torch.tensor([gamma]))
        self.x0 = nn.Parameter(torch.zeros(1, ch, 9, 9))  # in the published state dict; used by nothing
        self.layers = nn.ModuleList()
        for _ in range(L):
            omg = Frequencies(ch, shared=global_omg, init=init_omg) if use_omega else None
            if omg is not None:
                omg.omg_param.requires_grad_(learn_omg)
            layer = KLayer(n, ch, Attention(ch, heads, (9, 9)), "none", omg, True)
            self.layers.append(nn.ModuleList([layer, nn.Sequential(Norms(ch, n), *refinement(ch, 1, "none"))]))
        self.out = nn.Sequential(nn.ReLU(), nn.Conv2d(ch, 9, 1))

    def forward(self, puzzle: Tensor, given: Tensor, noise: Tensor) -> dict[str, Tensor]:
        digits = (puzzle * torch.arange(1, 10)).sum(-1)
        c = self.embedding(digits).permute(0, 3, 1, 2)
        x = torch.where(given.permute(0, 3, 1, 2).bool(), c, noise.flatten(1, 2))
        for layer, T in zip(self.layers, self.T, strict=True):
            x, _, energies = layer[0](x, c, T, self.gamma)
            c = layer[1](x)
        return {
            "logits": self.out(c).permute(0, 2, 3, 1),
            "energy": torch.stack([e.expand(len(x)) for e in energies]),
            "oscillators_final": x.unflatten(1, (-1, self.n)),
        }


class Classifier(nn.Module):
    """The CIFAR-10 classifier. `forward(images in [0,1], start [B, K, n, 32, 32])` -> logits and energies."""

    def __init__(
        self, n: int, ch: int, out_classes: int, L: int, T: Any, ksizes: list[int], J: Any = "conv", ro_ksize: int = 3,
        ro_N: int = 2, norm: str = "bn", c_norm: str = "gn", gamma: float = 1.0, init_omg: float = 1.0,
        use_omega: bool = True, global_omg: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.n, self.T = n, each(T, L)
        self.conv0 = nn.Conv2d(3, ch, 3, padding=1, bias=False)
        self.gamma = nn.Parameter(torch.tensor([gamma]))
        self.layers = nn.ModuleList()
        for i in range(L):
            width = ch * 2**i
            assert each(J, L)[i] == "conv"
            coupling = nn.Conv2d(width, width, ksizes[i], padding=ksizes[i] // 2)
            omg = Frequencies(width, shared=global_omg, init=init_omg) if use_omega else None
            layer = KLayer(n, width, coupling, c_norm, omg, True)
            reading = nn.Sequential(Norms(width, ro_N, ro_ksize), *refinement(width, ro_ksize, norm))
            down: nn.Module = nn.Identity()
            if i:
                conv = nn.Conv2d(width // 2, width, 3, stride=2, padding=1)
                down = nn.ModuleList([conv, conv])  # one convolution under two names: for c and for x
            self.layers.append(nn.ModuleList([down, nn.Identity(), layer, reading]))
        self.out = nn.Linear(ch * 2 ** (L - 1), out_classes)

    def forward(self, images: Tensor, start: Tensor) -> dict[str, Tensor]:
        c, x = self.conv0((images - 0.5) / 0.5), start.flatten(1, 2)
        seen: dict[str, Tensor] = {}
        for i, (layer, T) in enumerate(zip(self.layers, self.T, strict=True)):
            if i:
                c, x = layer[0][0](c), layer[0][1](x)
            x, _, energies = layer[2](x, c, T, self.gamma)
            seen[f"layer{i}.energy"] = torch.stack([e.expand(len(x)) for e in energies])
            c = layer[3](x)
        return {**seen, "logits": self.out(c.mean((2, 3)))}
