"""One process's part of a global batch: tensors, and which samples of the stream they came from.

Shapes: b samples of this part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pretrain.data import counter


@dataclass(frozen=True)
class Batch:
    """What a task computes a step from. Slices share memory with the whole.

    `tensors` have samples as first dimension. `samples` are positions in the shard index, `epochs` passes over the
    data, `positions` places in the training stream; int64 [b], always on the host: reading them waits for no device.
    """

    tensors: dict[str, Tensor]
    samples: Tensor
    epochs: Tensor
    positions: Tensor
    seed: int

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, part: slice) -> Batch:
        return replace(
            self,
            tensors={name: tensor[part] for name, tensor in self.tensors.items()},
            samples=self.samples[part],
            epochs=self.epochs[part],
            positions=self.positions[part],
        )

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(iter(self.tensors.values())).device if self.tensors else torch.device("cpu")

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on `device`."""
        return replace(self, tensors={name: tensor.to(device) for name, tensor in self.tensors.items()})

    def keys_for(self, purpose: str, view: int = 0) -> Tensor:
        """Keys of this view of the samples, int64 [b] on the batch's device (counter.py)."""
        keys = counter.key(self.seed, self.epochs.numpy(), self.samples.numpy(), view, purpose)
        return torch.from_numpy(keys.view(np.int64)).to(self.device, non_blocking=True)

    def starts(self, shape: Sequence[int], view: int = 0) -> Tensor:
        """Initial oscillators of this view of the samples, N(0, 1), float32 [b, *shape] on the batch's device."""
        return counter.normal(self.keys_for("start", view), shape)
