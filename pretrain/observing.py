"""Evaluation while training: what an observer is, and what it may look at.

Owns: the protocol between the trainer and evaluations that it knows nothing of. They come in from above, by
`run(config, observers=...)`, and see the averaged weights.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from pretrain.resume import part_of, prefix_of
from pretrain.schedule import due

if TYPE_CHECKING:
    from configs.schema import PretrainConfig
    from pretrain.distributed import Ranks
    from pretrain.ema import Ema
    from pretrain.tasks import Task


class Observer(Protocol):
    """An evaluation made every `every` steps, on every rank."""

    every: int

    def observe(self, step: int, state: TrainerState) -> dict[str, float]:
        """Return figures to log with the step, by name; equal on all ranks."""
        ...


@dataclass
class TrainerState:
    """What an observer may look at."""

    config: PretrainConfig
    ranks: Ranks
    run_dir: Path
    task: Task
    ema: Ema
    _twin: nn.Module
    _prefix: str

    def backbone_ema(self) -> Any:
        """The backbone with averaged weights, in evaluation mode, apart from the one in training (collective)."""
        self._twin.load_state_dict(part_of(self.ema.weights(), self._prefix))
        return self._twin


def make_twin(task: Task, device: torch.device) -> tuple[nn.Module, str]:
    """A copy of the backbone and the prefix of its names; to be made before DeepSpeed takes the module apart."""
    return copy.deepcopy(task.backbone).eval().requires_grad_(False).to(device), prefix_of(task.module, task.backbone)


def observe(observers: Sequence[Observer], step: int, state: TrainerState | None) -> dict[str, float]:
    """Call the observers that are due after `step` complete steps; their figures, by name (collective).

    The training's random generator is put back, so that looking changes nothing.
    """
    figures: dict[str, float] = {}
    for observer in observers:
        if state is not None and due(step, observer.every):
            with torch.random.fork_rng(), torch.no_grad():
                figures |= observer.observe(step, state)
    return figures
