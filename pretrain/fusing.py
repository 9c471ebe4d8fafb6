"""Functions of many small operations on tensors: one kernel of torch.compile's on GPUs, as they are elsewhere.

Launching a kernel takes the host some microseconds, whatever it computes: hundreds of them for a step of a small model
are what the GPU waits for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from pretrain.native import find_compiler

_allowed = True


def allow(compiling: bool) -> None:
    """Whether functions are compiled from now on, in this process: `compute.compile`."""
    global _allowed
    _allowed = compiling


Function = TypeVar("Function", bound=Callable[..., Any])


def fused_on_gpu(function: Function) -> Function:
    """Compile `function` for calls whose first argument is on a GPU. Needs a C++ compiler there, else it runs as it is.

    The result is equal up to float rounding. Compiled again for a second shape, with free sizes, and hardly ever after
    (but for each size that an operation wants as a number, as the groups of a convolution).
    """

    @functools.cache
    def compiled() -> Callable[..., Any]:
        return torch.compile(function) if find_compiler() is not None else function

    @functools.wraps(function)
    def call(first: torch.Tensor, *rest: Any, **named: Any) -> Any:
        # Fake tensors, which are a subclass, run as they are: nothing is to be generated for them.
        chosen = compiled() if _allowed and type(first) is torch.Tensor and first.is_cuda else function
        return chosen(first, *rest, **named)

    return call  # type: ignore[return-value]
