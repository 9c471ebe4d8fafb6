"""Batches from the loader's shared memory to where they are computed on.

On CUDA the copy runs beside the computation, on a stream of its own, from pinned memory; a slot is filled again when
its copy is known to be done, which is asked one step later and so is never waited for.
"""

from __future__ import annotations

import contextlib
import warnings

import numpy as np
import torch
from torch import Tensor


class Transfer:
    """Copies slots to a device.

    Args:
        device: the target.
        memory: all slots as one block, uint8; page-locked for CUDA.
    """

    def __init__(self, device: torch.device, memory: np.ndarray) -> None:
        self.device = device
        self._busy: dict[int, torch.cuda.Event] = {}
        self._memory = memory
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._pinned = not int(torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, 0))
            if not self._pinned:
                warnings.warn("the loader's memory could not be pinned; copies to the GPU will wait", stacklevel=2)
                with contextlib.suppress(RuntimeError):  # CUDA keeps the error for the next kernel: not the training's
                    torch.ones(1, device=device)

    def copy(self, slot: int, arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
        """Tensors on the device with the content of a slot; `wait(slot)` before it is filled again."""
        host = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if self._stream is None:
            return {name: tensor.to(self.device, copy=True) for name, tensor in host.items()}
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._stream):
            tensors = {name: tensor.to(self.device, non_blocking=True) for name, tensor in host.items()}
            self._busy[slot] = torch.cuda.Event()
            self._busy[slot].record(self._stream)
        current.wait_stream(self._stream)
        for tensor in tensors.values():
            tensor.record_stream(current)
        return tensors

    def wait(self, slot: int) -> None:
        """Until the copy of a slot is done."""
        if slot in self._busy:
            self._busy.pop(slot).synchronize()

    def close(self) -> None:
        """Release the page lock; after the last copy."""
        if self._stream is not None:
            self._stream.synchronize()
            if self._pinned:
                torch.cuda.cudart().cudaHostUnregister(self._memory.ctypes.data)
            self._stream = None
