"""State dicts of the published code as ours: what each tensor becomes, and in which order of channels.

Published (arXiv 2410.13821, github.com/autonomousvision/akorn): [B, C, H, W], the component n is the fastest channel
index (K, n), the head the fastest one inside attention, GTA acts on consecutive channel pairs. Ours: tokens, components
as planes (n, K), head slowest, GTA pairs as halves (H, 2, P). Both are permutations of rows and columns.

Quirk: without Omega the published code adds x itself (kuramoto.py); models made here have `self_drift=True` then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def planes(n: int, dim: int) -> Tensor:
    """Published channel of each of our channels: index [C]. `t[planes]` turns (K, n) into (n, K)."""
    return torch.arange(dim).view(dim // n, n).t().reshape(-1)


def head_order(dim: int, num_heads: int) -> Tensor:
    """Published attention channel (P, 2, H) of each of ours (H, 2, P): index [C]."""
    return torch.arange(dim).view(-1, 2, num_heads).permute(2, 1, 0).reshape(-1)


def plain_head_order(dim: int, num_heads: int) -> Tensor:
    """The same without GTA: (D, H) into (H, D)."""
    return torch.arange(dim).view(-1, num_heads).t().reshape(-1)


class Source:
    """A published state dict that remembers what was taken and what was missed."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state, self.taken, self.missing = state, set[str](), list[str]()

    def __contains__(self, name: str) -> bool:
        return name in self.state

    def take(self, name: str) -> Tensor:
        """The tensor of that name; an empty one, and a note, where there is none."""
        self.taken.add(name)
        if name not in self.state:
            self.missing.append(name)
            return torch.empty(0)
        return self.state[name]

    def skip(self, name: str) -> None:
        """A tensor that is used by nothing and may be absent."""
        self.taken.add(name)

    def matrix(self, name: str) -> Tensor:
        """A 1x1 convolution as a matrix [out, in]."""
        weight = self.take(name)
        return weight.flatten(1) if weight.ndim == 4 else weight

    def check(self) -> None:
        """Raise ValueError naming every tensor that is missing, or that nothing here understands."""
        problems = [f"missing {name}" for name in self.missing]
        problems += [f"unknown {name}" for name in self.state if name not in self.taken]
        if problems:
            shown = ", ".join(problems[:8]) + (f" and {len(problems) - 8} more" if len(problems) > 8 else "")
            raise ValueError(
                f"the state dict does not fit the architecture arguments: {shown}. Check the arguments (J, L, gta, "
                "c_norm, use_omega, use_ro_x) against the command that trained it"
            )


State = dict[str, Tensor]


def attention(source: Source, old: str, new: str, *, num_heads: int, channels: Tensor) -> State:
    """W_qkv, W_o and, where there are, GTA matrices. `channels`: order of the state outside attention."""
    qkv, out = source.matrix(f"{old}W_qkv.weight"), source.matrix(f"{old}W_o.weight")
    qkv_bias, out_bias = source.take(f"{old}W_qkv.bias"), source.take(f"{old}W_o.bias")
    gta = f"{old}mat_q" in source
    matrices = [source.take(f"{old}mat_{part}") for part in "qkvo"] if gta else []
    if source.missing:
        return {}
    dim = len(channels)
    heads = (head_order if gta else plain_head_order)(dim, num_heads)
    state = {
        f"{new}qkv.weight": qkv.view(3, dim, dim)[:, heads][:, :, channels].reshape(3 * dim, dim),
        f"{new}qkv.bias": qkv_bias.view(3, dim)[:, heads].reshape(-1),
        f"{new}out.weight": out[channels][:, heads],
        f"{new}out.bias": out_bias[channels],
    }
    if gta:
        state[f"{new}gta_in"] = torch.stack(matrices[:3], dim=1).permute(3, 4, 0, 1, 2)  # [N, 3, P, 2, 2] before
        state[f"{new}gta_out"] = matrices[3].permute(2, 3, 0, 1)
    return state


def coupling(source: Source, old: str, new: str, *, num_heads: int, channels: Tensor) -> State:
    """Whichever connectivity the layer has."""
    if f"{old}W_qkv.weight" in source:
        return attention(source, old, new, num_heads=num_heads, channels=channels)
    weight, bias = source.take(f"{old}weight"), source.take(f"{old}bias")
    if source.missing:
        return {}
    return {f"{new}conv.weight": weight[channels][:, channels], f"{new}conv.bias": bias[channels]}


def kuramoto_layer(source: Source, old: str, new: str, *, n: int, num_heads: int, channels: Tensor) -> State:
    """Connectivity, normalisation of c and Omega of one K-layer."""
    state = coupling(source, f"{old}connectivity.", f"{new}coupling.", num_heads=num_heads, channels=channels)
    for ours, theirs in (("weight", "weight"), ("weight", "scale"), ("bias", "bias")):
        if f"{old}c_norm.{theirs}" in source:
            state[f"{new}c_norm.{ours}"] = source.take(f"{old}c_norm.{theirs}")[channels]
    if f"{old}omg.omg_param" in source:
        vector = source.take(f"{old}omg.omg_param")
        if vector.ndim == 2:  # a 2-vector per pair of channels (K, n/2)
            vector = vector.view(-1, n // 2, 2).permute(2, 1, 0)
        state[f"{new}omega.vector"] = vector
    return state


def readout(source: Source, old: str, new: str, *, n: int, channels: Tensor, linear: bool) -> State:
    """U, its bias and the bias of the norms. `n`: of the readout. `linear`: 1x1 convolution to a linear layer."""
    weight, inner, bias = (source.take(f"{old}{name}") for name in ("invconv.weight", "invconv.bias", "bias"))
    if source.missing:
        return {}
    dim = len(channels)
    weight = weight.view(dim, n, *weight.shape[1:])[channels][:, :, channels].transpose(0, 1).flatten(0, 1)
    return {
        f"{new}{'linear' if linear else 'conv'}.weight": weight.flatten(1) if linear else weight,
        f"{new}{'linear' if linear else 'conv'}.bias": inner.view(dim, n)[channels].t().reshape(-1),
        f"{new}bias": bias[channels],
    }


def affine(source: Source, old: str, new: str, *, rows: Tensor | None, columns: Tensor | None, linear: bool) -> State:
    """A convolution or linear map with permuted outputs and inputs; a 1x1 convolution becomes a matrix if `linear`."""
    weight = source.matrix(f"{old}weight") if linear else source.take(f"{old}weight")
    bias = source.take(f"{old}bias") if f"{old}bias" in source else None
    if source.missing:
        return {}
    weight = weight if rows is None else weight[rows]
    state = {f"{new}weight": weight if columns is None else weight[:, columns]}
    if bias is not None:
        state[f"{new}bias"] = bias if rows is None else bias[rows]
    return state


def projector_of(source: Source, channels: Tensor) -> dict[str, Any]:
    """SimCLR's projector, Linear -> ReLU -> Linear, as a state dict of an nn.Sequential."""
    return {
        **affine(source, "out.3.", "0.", rows=None, columns=channels, linear=True),
        **affine(source, "out.5.", "2.", rows=None, columns=None, linear=True),
    }
