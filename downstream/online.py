"""Evaluation while training: k-NN and object discovery on a few images, with the averaged weights.

Owns: the observers that the launcher hands to the trainer. Rank 0 computes and tells the others, which wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from configs import PretrainConfig, UserError
from configs.presets import PRESETS
from downstream import discovery
from downstream.discovery import Protocol
from downstream.encoder import Encoder
from downstream.grouping import Grouping
from downstream.neighbours import knn_accuracy
from downstream.samples import INSTANCES, LABEL, Samples
from pretrain.distributed import broadcast_json
from pretrain.observing import Observer, TrainerState

NEIGHBOURS, TEMPERATURE = 20, 0.07
_BATCH = 64


def make_observers(config: PretrainConfig) -> Sequence[Observer]:
    """The observers that a run's configuration asks for.

    Raises:
        UserError: an interval is given without its data, or there is no such protocol.
    """
    wanted = config.observers
    found: list[Observer] = []
    if wanted.knn_every is not None:
        if wanted.knn_train is None or wanted.knn_test is None:
            raise UserError("observers.knn_every needs observers.knn_train and observers.knn_test (labelled shards)")
        found.append(OnlineNeighbours(wanted.knn_every, wanted.knn_train, wanted.knn_test, wanted.images))
    if wanted.objects_every is not None:
        if wanted.objects_data is None:
            raise UserError("observers.objects_every needs observers.objects_data (shards with instances.png)")
        if wanted.objects_preset not in PRESETS:
            raise UserError(f"observers.objects_preset: no protocol {wanted.objects_preset!r}: {', '.join(PRESETS)}")
        found.append(OnlineObjects(wanted.objects_every, wanted.objects_data, wanted.objects_preset, wanted.images))
    return found


class OnlineNeighbours:
    """Top-1 of a weighted 20-NN on pooled features: `images` test images against ten times as many neighbours."""

    def __init__(self, every: int, train: str, test: str, images: int) -> None:
        self.every = every
        self._sets = (
            Samples(train, limit=10 * images, needs=(LABEL,)),
            Samples(test, limit=images, needs=(LABEL,)),
        )

    def observe(self, step: int, state: TrainerState) -> dict[str, float]:
        """Collective."""
        backbone = state.backbone_ema()
        figures: dict[str, float] = {}
        if state.ranks.first:
            encoder = Encoder(backbone, name="online", device=state.ranks.device)
            size = _size(state, encoder)
            train, test = (self._features(encoder, samples, size) for samples in self._sets)
            labels, answers = (samples.labels() for samples in self._sets)
            found = knn_accuracy(
                train, labels, test, answers, neighbours=(NEIGHBOURS,), temperature=TEMPERATURE
            )  # fmt: skip
            figures = {"online_knn": found[NEIGHBOURS]["top1"]}
        return dict(broadcast_json(figures, state.ranks))

    @staticmethod
    def _features(encoder: Encoder, samples: Samples, size: int) -> torch.Tensor:
        blocks = (samples.images(block, resize=size, size=size) for block in samples.blocks(_BATCH))
        return torch.cat([encoder.encode(images).pooled.cpu() for images in blocks])


class OnlineObjects:
    """FG-ARI and MBO by average linkage, one start, no up-tiling."""

    def __init__(self, every: int, data: str, preset: str, images: int) -> None:
        self.every = every
        self._samples = Samples(data, limit=images, needs=(INSTANCES,))
        self._protocol = Protocol(PRESETS[preset], Grouping(clusters=PRESETS[preset].clusters), starts=1)

    def observe(self, step: int, state: TrainerState) -> dict[str, float]:
        """Collective."""
        backbone = state.backbone_ema()
        figures: dict[str, float] = {}
        if state.ranks.first:
            encoder = Encoder(backbone, name="online", device=state.ranks.device)
            blocks: list[Any] = [
                discovery.score_scene(encoder, self._samples.scenes(block, self._protocol.preset), self._protocol)
                for block in self._samples.blocks(_BATCH)
            ]
            scores = discovery.gather(blocks)
            figures = {f"online_{name}": discovery.summarise(scores[name])["mean"] for name in ("fg_ari", "mbo_i")}
        return dict(broadcast_json(figures, state.ranks))


def _size(state: TrainerState, encoder: Encoder) -> int:
    """Side of the images: that of the training views."""
    views = state.config.views
    return views.size if views is not None else int(encoder.model.pretrained_cfg["input_size"][-1])
