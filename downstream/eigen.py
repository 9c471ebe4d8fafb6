"""Leading eigenvectors of many small symmetric matrices.

Owns: the native kernel (eigen.cpp), which computes no more of them than asked for, and torch's solver in its place on
GPUs, without a compiler, and for matrices with eigenvalues too close to tell apart. B matrices [n, n], m eigenvectors.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from downstream import native

_ORTHOGONAL = 1e-3  # the inner products of neighbouring eigenvectors, summed


def leading(matrices: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Values [B, m] and vectors [B, n, m] of the `count` largest eigenvalues of float32 matrices [B, n, n], rising."""
    kernel = None if matrices.is_cuda else native.library("eigen")
    if kernel is None or not len(matrices):
        return _by_torch(matrices, count)
    matrices = matrices.contiguous()
    images, rows, _ = matrices.shape
    values, vectors = matrices.new_empty(images, count), matrices.new_empty(images, rows, count)
    pointers = [ctypes.c_void_p(one.data_ptr()) for one in (matrices, vectors, values)]
    sizes = [ctypes.c_int64(size) for size in (images, rows, count, torch.get_num_threads())]
    kernel.leading_eigenvectors(pointers[0], *sizes[:3], *pointers[1:], sizes[3])
    skew = (vectors[..., 1:] * vectors[..., :-1]).sum(1).abs().sum(1)
    close = ~(skew < _ORTHOGONAL)
    if bool(close.any()):
        values[close], vectors[close] = _by_torch(matrices[close], count)
    return values, vectors


def _by_torch(matrices: Tensor, count: int) -> tuple[Tensor, Tensor]:
    # In double: tokens that are all alike leave a matrix of rounding errors, on which the float solver fails.
    values, vectors = torch.linalg.eigh(matrices.double())
    return values[:, -count:].to(matrices.dtype), vectors[..., -count:].to(matrices.dtype)
