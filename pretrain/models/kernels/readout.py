"""The readout in one call per direction (readout.h), for autograd.

Its linear map is kept for the backward (in the type of the products), or, with recomputation, never goes to memory.

Legend: B images, N tokens, M = B*N, C channels in, O channels out, n planes.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain import blocks
from pretrain.models.kernels.build import library
from pretrain.models.kernels.native import TOKEN_MULTIPLE, call, point, product_dtype

if TYPE_CHECKING:
    from pretrain.models.kuramoto import Readout


class _Readout(ctypes.Structure):
    """struct Readout of readout.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("M", "C", "O", "n", "threads")),
        *((name, ctypes.c_void_p) for name in ("x", "w", "b", "bias", "out", "kept", "grad", "d_x", "d_w", "d_b")),
    )


def supports(readout: Readout, x: Tensor) -> bool:
    """Whether the kernel computes this readout on an input like x [B, N, C], under the present autocast."""
    dtype = product_dtype(x.device)
    if not (
        readout.linear.in_features % 32 == readout.out_dim % 16 == 0
        and type(x) is Tensor  # neither fake nor traced
        and x.device.type == "cpu"
        and x.dtype == readout.linear.weight.dtype == torch.float32
        and dtype in (torch.float32, torch.bfloat16)
        and not torch.compiler.is_compiling()
    ):
        return False
    found = library()
    return found.handle is not None and (dtype == torch.float32 or found.bf16)


def run(readout: Readout, x: Tensor) -> Tensor:
    """Norms over n plus bias [B, N, O] of a readout that `supports` accepts."""
    tokens = x.flatten(0, 1)
    rest = -len(tokens) % TOKEN_MULTIPLE
    if rest:
        tokens = F.pad(tokens, (0, 0, 0, rest))
    linear = readout.linear
    keep = not readout.grad_checkpointing
    dtype = product_dtype(x.device)
    out = _NativeReadout.apply(tokens, linear.weight, linear.bias, readout.bias, readout.n, dtype, keep)
    return out[: len(tokens) - rest].unflatten(0, x.shape[:2])


class _NativeReadout(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Tensor, bias: Tensor, n: int, dtype: torch.dtype, keep: bool
    ) -> Tensor:  # fmt: skip
        inputs = [tensor.detach().contiguous() for tensor in (x, w, b, bias)]
        out = x.new_empty(len(x), len(bias))
        arguments = _describe(inputs, n)
        kept = blocks.kept.empty((len(x), len(b)), dtype) if keep and any(ctx.needs_input_grad) else None
        point(arguments, {"out": out, "kept": kept})
        call("readout_forward", dtype, arguments)
        ctx.n, ctx.dtype = n, dtype
        ctx.save_for_backward(*inputs, kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w, b, bias, kept = ctx.saved_tensors
        grad = grads[0].float().contiguous()
        d_x, d_w, d_b = torch.empty_like(x), torch.zeros_like(w), torch.zeros_like(b)
        arguments = _describe([x, w, b, bias], ctx.n)
        point(arguments, {"kept": kept, "grad": grad, "d_x": d_x, "d_w": d_w, "d_b": d_b})
        call("readout_backward", ctx.dtype, arguments)
        return d_x, d_w, d_b, grad.sum(0), None, None, None


def _describe(inputs: list[Tensor], n: int) -> _Readout:
    x, _, _, bias = inputs
    arguments = _Readout(M=len(x), C=x.shape[1], O=len(bias), n=n, threads=torch.get_num_threads())
    point(arguments, dict(zip(("x", "w", "b", "bias"), inputs)))
    return arguments
