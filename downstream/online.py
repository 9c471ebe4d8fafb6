"""Evaluation while training: k-NN and object discovery on a few images, with the averaged weights.

Owns: the observers that the launcher hands to the trainer (pretrain/observing.py says where and when they run). They
hold the names of their data, checked at the start, and open them where they run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from configs import PretrainConfig
from configs.presets import PRESETS
from downstream import discovery
from downstream.discovery import Protocol
from downstream.encoder import Encoder
from downstream.grouping import Grouping
from downstream.neighbours import knn_accuracy
from downstream.samples import INSTANCES, LABEL, Samples
from pretrain.observing import Observer

NEIGHBOURS, TEMPERATURE = 20, 0.07
_BATCH = 64


def make_observers(config: PretrainConfig) -> Sequence[Observer]:
    """The observers that a run's configuration asks for."""
    wanted = config.observers
    found: list[Observer] = []
    if wanted.knn_every is not None:
        assert wanted.knn_train is not None
        assert wanted.knn_test is not None
        found.append(OnlineNeighbours(wanted.knn_every, wanted.knn_train, wanted.knn_test, wanted.images))
    if wanted.objects_every is not None:
        assert wanted.objects_data is not None
        found.append(OnlineObjects(wanted.objects_every, wanted.objects_data, wanted.objects_preset, wanted.images))
    return found


class OnlineNeighbours:
    """Top-1 of a weighted 20-NN on pooled features: `images` test images against ten times as many neighbours."""

    def __init__(self, every: int, train: str, test: str, images: int) -> None:
        self.every = every
        self._sets = ((train, 10 * images), (test, images))
        self._open()

    def _open(self) -> list[Samples]:
        return [Samples(location, limit=limit, needs=(LABEL,)) for location, limit in self._sets]

    def observe(self, backbone: Any, config: PretrainConfig, device: torch.device) -> dict[str, float]:
        """Share of test images whose class is found."""
        encoder, sets = Encoder(backbone, name="online", device=device), self._open()
        size = _size(config, encoder)
        train, test = (self._features(encoder, samples, size) for samples in sets)
        labels, answers = (samples.labels() for samples in sets)
        found = knn_accuracy(train, labels, test, answers, neighbours=(NEIGHBOURS,), temperature=TEMPERATURE)
        return {"online_knn": found[NEIGHBOURS]["top1"]}

    @staticmethod
    def _features(encoder: Encoder, samples: Samples, size: int) -> torch.Tensor:
        blocks = (samples.images(block, resize=size, size=size) for block in samples.blocks(_BATCH))
        return torch.cat([encoder.encode(images).pooled.cpu() for images in blocks])


class OnlineObjects:
    """FG-ARI and MBO by average linkage, one start, no up-tiling."""

    def __init__(self, every: int, data: str, preset: str, images: int) -> None:
        self.every, self._data, self._images = every, data, images
        self._protocol = Protocol(PRESETS[preset], Grouping(clusters=PRESETS[preset].clusters), starts=1)
        self._open()

    def _open(self) -> Samples:
        return Samples(self._data, limit=self._images, needs=(INSTANCES,))

    def observe(self, backbone: Any, config: PretrainConfig, device: torch.device) -> dict[str, float]:
        """Means over the images."""
        encoder, samples = Encoder(backbone, name="online", device=device), self._open()
        blocks: list[Any] = [
            discovery.score_scene(encoder, samples.scenes(block, self._protocol.preset), self._protocol)
            for block in samples.blocks(_BATCH)
        ]
        scores = discovery.gather(blocks)
        return {f"online_{name}": discovery.summarise(scores[name])["mean"] for name in ("fg_ari", "mbo_i")}


def _size(config: PretrainConfig, encoder: Encoder) -> int:
    """Side of the images: that of the training views."""
    views = config.views
    return views.size if views is not None else int(encoder.model.pretrained_cfg["input_size"][-1])
