"""Memory shared between processes without a name: nothing is left behind however they end.

Owns: one anonymous block (a memfd, which no limit of /dev/shm bounds; an unlinked file where there are none), handed to
a worker by its descriptor when the worker starts, and arrays laid out in it.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Mapping
from multiprocessing import reduction
from typing import Any

import numpy as np

from configs.errors import UserError

ALIGNMENT = 4096

# Name of an array -> its shape and type.
Layout = Mapping[str, tuple[tuple[int, ...], np.dtype]]


class Memory:
    """A zeroed block of memory. Picklable while a process is being started, where it is then the same memory."""

    def __init__(self, num_bytes: int) -> None:
        """
        Raises:
            UserError: the machine has not that much left.
        """
        self.num_bytes = max(1, num_bytes)
        if hasattr(os, "memfd_create"):
            self._descriptor = os.memfd_create("akorn-loader", os.MFD_CLOEXEC)
        else:
            with tempfile.TemporaryFile() as file:
                self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        try:
            os.ftruncate(self._descriptor, self.num_bytes)
            self._map = mmap.mmap(self._descriptor, self.num_bytes)
        except OSError as error:
            raise UserError(
                f"the loader cannot have {self.num_bytes / 1e9:.1f} GB of memory ({error.strerror}): lower "
                "loading.prefetch or batch_size, or set data.keep=disk"
            ) from error

    @classmethod
    def _received(cls, descriptor: Any, num_bytes: int) -> Memory:
        memory = cls.__new__(cls)
        memory.num_bytes = num_bytes
        memory._descriptor = descriptor.detach()
        weakref.finalize(memory, os.close, memory._descriptor)
        memory._map = mmap.mmap(memory._descriptor, num_bytes)
        return memory

    def __reduce__(self) -> tuple[Any, ...]:
        return Memory._received, (reduction.DupFd(self._descriptor), self.num_bytes)

    def bytes(self) -> np.ndarray:
        """The whole block, uint8 [num_bytes], writable."""
        return np.frombuffer(self._map, np.uint8)

    def arrays(self, layout: Layout, first: int = 0) -> dict[str, np.ndarray]:
        """Arrays of a layout from byte `first` on."""
        result = {}
        for name, (shape, dtype) in layout.items():
            count = int(np.prod(shape, dtype=np.int64))
            result[name] = np.frombuffer(self._map, dtype, count, first).reshape(shape)
            first += padded(count * dtype.itemsize)
        return result


def padded(num_bytes: int) -> int:
    """Bytes up to the next page."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def size_of(layout: Layout) -> int:
    """Bytes that the arrays of a layout take."""
    return sum(padded(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize) for shape, dtype in layout.values())
