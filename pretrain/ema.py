"""The running average of the weights that is evaluated and exported.

Owns: the decay over time and the averaged copies. The decay ramps up by the formula of ema_pytorch to its largest
value, 1 - (1 + updates)^(-2/3): a constant one near 1 would leave a short run with nearly untrained weights. Deviation:
updates are the averages taken here, and the steps there; with `every` 10 ema_pytorch ramps up ten times as fast, and
its average of a short run reaches further back than ours. Each rank averages what it holds of the weights (all of them
below ZeRO stage 3, its part there). Buffers (BatchNorm's statistics) are averages already and are taken as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from configs.schema import Ema as EmaConfig
from pretrain.schedule import due

if TYPE_CHECKING:
    from pretrain.engine import Engine


def decay_at(updates: int, largest: float) -> float:
    """Decay of the update that follows `updates` earlier ones: 0 at first, rising to `largest`."""
    return min(largest, 1.0 - (1.0 + updates) ** (-2.0 / 3.0))


def largest_decay(config: EmaConfig, steps: int) -> float:
    """The decay as given, or from `horizon`: the average spans about that share of the run's steps."""
    if config.horizon is None:
        return config.decay
    return max(0.0, 1.0 - config.every / max(config.horizon * steps, config.every))


class Ema:
    """Averages by parameter name, fp32, where the weights are. Until after `start` steps they are the weights."""

    def __init__(self, engine: Engine, config: EmaConfig, steps: int) -> None:
        self._engine, self._every, self._start = engine, config.every, config.start
        self._largest = largest_decay(config, steps)
        self._averages: dict[str, Tensor] = {}
        self.updates = 0

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` complete steps, when an update is due."""
        if self._largest == 0 or step <= self._start or not due(step, self._every):
            return
        weights = self._engine.shards()
        if not self._averages:
            self._averages = {name: t.clone() for name, t in weights.items()}
        averages = [self._averages[name] for name in weights]
        torch._foreach_lerp_(averages, list(weights.values()), 1.0 - decay_at(self.updates, self._largest))
        self.updates += 1

    def weights(self) -> dict[str, Tensor]:
        """Whole averaged parameters, and the buffers as they are, by name (collective at stage 3)."""
        averaged = self._engine.assemble(self._averages) if self._averages else {}
        return self._engine.weights() | averaged

    def load(self, weights: dict[str, Tensor], updates: int) -> None:
        """Continue from whole averaged tensors by name; does nothing before the first update."""
        self.updates = updates
        if updates > 0:
            shards = self._engine.shards()
            self._averages = {name: self._engine.shard(name, weights[name].to(t.device)) for name, t in shards.items()}
