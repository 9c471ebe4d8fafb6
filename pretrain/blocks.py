"""Memory on the CPU for what a step keeps until its backward, used again by the next step.

Freed to the C library, large tensors go back to the system, and the next step's come in fresh pages, which are emptied
before they are written: a tenth to a fifth of the forward, a quarter of the colour of views. Blocks are lent as
tensors, and are free again when these are gone.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

LEAST = 1 << 20  # bytes; smaller tensors are the C library's


class Blocks:
    """Blocks of memory: as many as were lent at once, each as large as the largest tensor that was put there."""

    def __init__(self) -> None:
        self._blocks: list[tuple[np.ndarray, Callable[[], object]]] = []  # and what holds it, None once it is free
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor on the CPU with undefined values."""
        count = math.prod(shape)
        size = count * dtype.itemsize
        if size < LEAST:
            return torch.empty(shape, dtype=dtype)
        with self._lock:
            memory = self._take(size)
            lent = memory[:size]
            self._blocks.append((memory, weakref.ref(lent)))
        return torch.frombuffer(lent, dtype=dtype, count=count).view(shape)

    def _take(self, size: int) -> np.ndarray:
        """The smallest free block of at least so many bytes; else a new one in place of the largest free one."""
        free = sorted((memory.nbytes, at) for at, (memory, lent) in enumerate(self._blocks) if lent() is None)
        fitting = next((at for nbytes, at in free if nbytes >= size), None)
        if fitting is not None:
            return self._blocks.pop(fitting)[0]
        if free:
            self._blocks.pop(free[-1][1])
        return torch.empty(size, dtype=torch.uint8).numpy()

    def clear(self) -> None:
        """Give back what is free, and, when their tensors are gone, what is lent."""
        self._blocks.clear()


kept = Blocks()
