"""The K-layer with attention coupling, or that coupling alone, in one call per direction (klayer.cpp), for autograd.

Legend: B images, N tokens, C channels, n components, K = C/n oscillators, H heads, D = C/H, P = D/2 pairs, T steps.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain import blocks
from pretrain.models.kernels.build import library

if TYPE_CHECKING:
    from pretrain.models.connectivity import AttentionCoupling, Grid, Positions
    from pretrain.models.kuramoto import KuramotoLayer

TOKEN_MULTIPLE = 32  # R of layer.h


class _Layer(ctypes.Structure):
    """struct Layer of layer.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("B", "N", "valid", "C", "n", "H", "steps")),
        *((name, ctypes.c_int64) for name in ("gta", "update", "projection", "self_drift", "keep", "threads")),
        ("gamma", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("w_qkv", "b_qkv", "w_out", "b_out", "own", "other", "frequency")),
        *((name, ctypes.c_void_p) for name in ("stimulus", "states", "qkv", "mixed", "drive", "lse")),
        *((name, ctypes.c_void_p) for name in ("grad", "d_stimulus", "d_w_qkv", "d_b_qkv", "d_w_out")),
        *((name, ctypes.c_void_p) for name in ("d_own", "d_other", "d_frequency", "d_gamma")),
    )


@dataclass(frozen=True)
class Plan:
    """What the kernel is told beside tensors.

    update: of oscillators; False leaves the coupling alone, x <- c + J x.
    recompute: keep the states only, and compute the rest again.
    """

    dtype: torch.dtype
    num_heads: int
    n: int = 1
    num_steps: int = 1
    update: bool = False
    projection: bool = False
    self_drift: bool = False
    recompute: bool = False


def takes(dim: int, n: int, num_heads: int, dtype: torch.dtype) -> bool:
    """Whether the kernel takes layers of this shape, with products in float32 or bfloat16. Compiles it at first."""
    head_dim = dim // num_heads
    shape = dim % (16 * n) == dim % 32 == 0 and n <= 16 and (head_dim == 16 or (head_dim % 32 == 0 and head_dim <= 512))
    if not shape or dtype not in (torch.float32, torch.bfloat16):
        return False
    found = library()
    return found.handle is not None and (dtype == torch.float32 or found.bf16)


def supports(layer: KuramotoLayer, x: Tensor) -> bool:
    """Whether the kernel computes this layer on an input like x [B, N, C], under the present autocast."""
    return layer.rule.norm == "sphere" and layer.coupling.runs_natively(x, layer.n)


def attends(coupling: AttentionCoupling, x: Tensor, n: int) -> bool:
    """Whether the kernel computes this coupling of oscillators of n components on an input like x [B, N, C]."""
    return (
        type(x) is Tensor  # neither fake nor traced
        and x.device.type == "cpu"
        and x.dtype == coupling.qkv.weight.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and takes(coupling.dim, n, coupling.num_heads, product_dtype(x.device))
    )


def run(
    layer: KuramotoLayer, x: Tensor, c: Tensor, grid: Grid, num_steps: int, gamma: float | Tensor,
    frequency: Tensor | None,
) -> Tensor:  # fmt: skip
    """All steps of a layer that `supports` accepts, from unit oscillators x under the normalised stimulus c."""
    coupling = cast("AttentionCoupling", layer.coupling)
    plan = Plan(
        dtype=product_dtype(x.device), num_heads=coupling.num_heads, n=layer.n, num_steps=num_steps, update=True,
        projection=layer.rule.projection, self_drift=layer.rule.self_drift and frequency is None,
        recompute=layer.grad_checkpointing,
    )  # fmt: skip
    if frequency is not None:
        frequency = frequency.expand(layer.n // 2, layer.dim // layer.n)
    tables = _tables(coupling.positions(grid))
    return run_layer(x, c, _weights(coupling), tables, frequency, torch.as_tensor(gamma, dtype=torch.float32), plan)


def couple(coupling: AttentionCoupling, x: Tensor, positions: Positions) -> Tensor:
    """J x of a coupling that `attends` accepts, float32 [B, N, C]."""
    plan = Plan(dtype=product_dtype(x.device), num_heads=coupling.num_heads)
    return run_layer(x, None, _weights(coupling), _tables(positions), None, torch.zeros(()), plan)


def _weights(coupling: AttentionCoupling) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return coupling.qkv.weight, coupling.qkv.bias, coupling.out.weight, coupling.out.bias


def _tables(positions: Positions) -> tuple[Tensor, Tensor] | None:
    return None if positions is None else pair_tables(positions[0].squeeze(4), positions[1].squeeze(3))


def product_dtype(device: torch.device) -> torch.dtype:
    """Type of matrix products here: autocast's, or float32, which stands for bfloat16 too on CPUs without it."""
    if not torch.is_autocast_enabled(device.type):
        return torch.float32
    dtype = torch.get_autocast_dtype(device.type)
    return torch.float32 if device.type == "cpu" and dtype == torch.bfloat16 and not library().bf16 else dtype


def pair_tables(gta_in: Tensor, gta_out: Tensor) -> tuple[Tensor, Tensor]:
    """GTA matrices [2, 2, N, 3, P], [2, 2, N, P] as two factors [4, N, D]: own * u + other * (u, halves swapped)."""
    matrices = torch.cat([gta_in.permute(3, 0, 1, 2, 4), gta_out.unsqueeze(0)])  # [4, 2, 2, N, P]
    own = torch.cat([matrices[:, 0, 0], matrices[:, 1, 1]], dim=-1)
    return own, torch.cat([matrices[:, 0, 1], matrices[:, 1, 0]], dim=-1)


def run_layer(
    x: Tensor, c: Tensor | None, weights: tuple[Tensor, Tensor, Tensor, Tensor], tables: tuple[Tensor, Tensor] | None,
    frequency: Tensor | None, gamma: Tensor, plan: Plan,
) -> Tensor:  # fmt: skip
    """T steps from unit oscillators x under c (None: no stimulus), float32 [B, N, C] each.

    weights: of the projections to q, k, v [3C, C], [3C] and of the output [C, C], [C]; tables: see `pair_tables`;
    frequency [n/2, K] or None.
    """
    num_tokens = x.shape[1]
    rest = -num_tokens % TOKEN_MULTIPLE
    if rest:
        x, c = F.pad(x, (0, 0, 0, rest)), None if c is None else F.pad(c, (0, 0, 0, rest))
        tables = tables and (F.pad(tables[0], (0, 0, 0, rest)), F.pad(tables[1], (0, 0, 0, rest)))
    own, other = tables if tables is not None else (None, None)
    out = _NativeLayer.apply(x, c, *weights, own, other, frequency, gamma, plan, num_tokens)
    return out[:, :num_tokens] if rest else out


def point(arguments: ctypes.Structure, tensors: Mapping[str, Tensor | None]) -> None:
    """Set the pointers of a struct. The tensors must outlive its use."""
    for name, tensor in tensors.items():
        assert tensor is None or tensor.is_contiguous(), name
        setattr(arguments, name, None if tensor is None else tensor.data_ptr())


def call(function: str, dtype: torch.dtype, arguments: ctypes.Structure) -> None:
    """Call a function of klayer.cpp in the form for products in `dtype`."""
    handle = library().handle
    assert handle is not None
    getattr(handle, f"{function}_{'float' if dtype == torch.float32 else 'bf16'}")(ctypes.byref(arguments))


class _NativeLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, c: Tensor | None, w_qkv: Tensor, b_qkv: Tensor, w_out: Tensor, b_out: Tensor,
        own: Tensor | None, other: Tensor | None, frequency: Tensor | None, gamma: Tensor, plan: Plan, valid: int,
    ) -> Tensor:  # fmt: skip
        B, N, C = x.shape
        keep = any(ctx.needs_input_grad)
        given = (c, w_qkv, b_qkv, w_out, b_out, own, other, frequency)
        inputs = [None if tensor is None else tensor.detach().contiguous() for tensor in given]
        new = blocks.kept.empty if keep else torch.empty
        states = new((plan.num_steps * keep + 1, B, N, C), dtype=torch.float32)
        states[0].copy_(x)
        kept: list[Tensor | None] = [None] * 4
        if keep and not plan.recompute:
            shape = (plan.num_steps, B, N)
            qkv, mixed = (new((*shape, width), dtype=plan.dtype) for width in (3 * C, C))
            drive = new((*shape, C), dtype=plan.dtype) if plan.update else None
            kept = [qkv, mixed, drive, x.new_empty((plan.num_steps, B, plan.num_heads, N))]
        layer = _describe(states, inputs, kept, gamma, plan, valid, keep=keep)
        call("forward", plan.dtype, layer)
        ctx.plan, ctx.valid = plan, valid
        ctx.save_for_backward(states, *inputs, *kept, gamma)
        return states[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        states, *rest, gamma = ctx.saved_tensors
        inputs, kept = rest[:8], rest[8:]
        layer = _describe(states, inputs, kept, gamma, ctx.plan, ctx.valid, keep=True)
        C = states.shape[-1]
        own, frequency = inputs[5], inputs[7]
        groups = C // max(C // ctx.plan.num_heads, 32 if C % 64 else 64)  # see layer.h
        out: dict[str, Tensor | None] = {
            "grad": grads[0].float().clone(memory_format=torch.contiguous_format),
            "d_stimulus": None if inputs[0] is None else torch.empty_like(states[0]),
            "d_w_qkv": states.new_zeros(groups, 3, C // groups, C),
            "d_b_qkv": states.new_zeros(groups, 3, C // groups),
            "d_w_out": states.new_zeros(C, C),
            "d_own": None if own is None else torch.zeros_like(own),
            "d_other": None if own is None else torch.zeros_like(own),
            "d_frequency": None if frequency is None else torch.zeros_like(frequency),
            "d_gamma": states.new_zeros(1, dtype=torch.float64),
        }
        point(layer, out)
        call("backward", ctx.plan.dtype, layer)
        d_c, d_gamma, d_w_qkv, d_b_qkv, d_w_out = (
            cast("Tensor", out[f"d_{name}"]) for name in ("stimulus", "gamma", "w_qkv", "b_qkv", "w_out")
        )
        # The bias of the output projection enters every step as c does.
        d_b_out = (grads[0].float() if d_c is None else d_c).sum((0, 1))
        d_w_qkv, d_b_qkv = (
            by_group.transpose(0, 1).reshape(3 * C, *by_group.shape[3:]) for by_group in (d_w_qkv, d_b_qkv)
        )
        weights = (d_w_qkv, d_b_qkv, d_w_out.T, d_b_out)
        tables = (out["d_own"], out["d_other"], out["d_frequency"])
        return (out["grad"], d_c, *weights, *tables, d_gamma.reshape(gamma.shape).float(), None, None)


def _describe(
    states: Tensor, inputs: list[Tensor | None], kept: list[Tensor | None], gamma: Tensor, plan: Plan, valid: int, *,
    keep: bool,
) -> _Layer:  # fmt: skip
    """The struct of a call. The tensors must outlive it: it holds addresses only."""
    _, B, N, C = states.shape
    layer = _Layer(
        B=B, N=N, valid=valid, C=C, n=plan.n, H=plan.num_heads, steps=plan.num_steps, gta=inputs[5] is not None,
        update=plan.update, projection=plan.projection, self_drift=plan.self_drift, keep=keep,
        threads=torch.get_num_threads(), gamma=float(gamma),
    )  # fmt: skip
    names = ("stimulus", "w_qkv", "b_qkv", "w_out", "b_out", "own", "other", "frequency")
    point(layer, {"states": states, **dict(zip(names, inputs)), **dict(zip(("qkv", "mixed", "drive", "lse"), kept))})
    return layer
