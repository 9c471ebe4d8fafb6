"""Generated: the scenes of pretrain/data/scenes as sources, PNG with instance masks and a label.

The label of a scene is the number of different colours among its visible objects, less one: something to probe for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.data.scenes import SCENES
from pretrain.data.sources.picture import encode_png
from pretrain.data.sources.sample import Request, Sample, key_of

BATCH = 128  # scenes rendered at once
IGNORE = 255  # in masks
DEFAULT_COUNT = 20_000


@dataclass(frozen=True)
class GeneratedSource:
    """Scenes 0 to count - 1 of a seed."""

    name: str
    count: int
    seed: int
    classes: Sequence[str] = ()

    def __len__(self) -> int:
        return self.count

    def read(self, numbers: np.ndarray) -> Iterator[Sample]:
        render = SCENES[self.name]
        for first in range(0, len(numbers), BATCH):
            batch = numbers[first : first + BATCH]
            for number, image, mask in zip(batch, *render(self.seed, batch)):
                label = f"{different_colours(image, mask) - 1}".encode()
                yield Sample(
                    key_of(int(number)),
                    {"png": encode_png(image), "cls": label, "instances.png": encode_png(mask)},
                )


def different_colours(image: np.ndarray, mask: np.ndarray) -> int:
    """Number of colours among the objects of a scene, each taken at one of its pixels; at least 1. [H, W, 3], [H, W]"""
    objects, first = np.unique(mask, return_index=True)
    visible = first[(objects > 0) & (objects < IGNORE)]
    return max(len(np.unique(image.reshape(-1, 3)[visible], axis=0)), 1)


def open_source(name: str, request: Request) -> dict[str, GeneratedSource]:
    """One set without splits; another seed makes another set (a test set, say)."""
    count = DEFAULT_COUNT if request.count is None else request.count
    return {"": GeneratedSource(name, count, request.seed)}
