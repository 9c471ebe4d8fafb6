"""Supervised classification with cross-entropy, of any labelled shard set by any timm model or AKOrN's classifier.

Owns: the task and what is done to an image for it: one random view (crop, flip, colour: views.py) and, as published for
AKOrN's robust classifier (arXiv 2410.13821), AugMix (arXiv 1912.02781), here between crop and colour. The backbone is
the whole classifier, head included; initial oscillators are keyed by the sample.

Legend: b images, S side of a view, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import PretrainConfig, Views
from configs.tasks import ClassifyTask
from pretrain.data import counter
from pretrain.data.decode import BrokenImageError
from pretrain.data.fetch import Work
from pretrain.data.views import SimclrTransform

if TYPE_CHECKING:
    from pretrain.data.batch import Batch


@dataclass(frozen=True)
class ClassifyTransform:
    """Parts of a sample -> one view and its label. Picklable and pure: AugMix too draws from the sample's key."""

    views: Views
    seed: int
    num_classes: int
    max_pixels: int
    augmix: bool = False

    def draws(self, epochs: np.ndarray, samples: np.ndarray) -> list[tuple[np.ndarray, int]]:
        """The draws of each sample's view, and 64 bits for AugMix."""
        keys = counter.key(self.seed, epochs, samples, 0, "transform")
        return list(zip(self._simclr.draws(epochs, samples), keys.tolist()))

    def __call__(self, parts: Mapping[str, Any], draws: tuple[np.ndarray, int]) -> Work:
        """Returns what makes {"images": uint8 [1, 3, S, S], "colour": float32 [1, P], "label": int64 []}.

        Raises:
            UserError: a label beyond the number of classes.
            BrokenImageError: no label, or the image cannot be decoded.
        """
        label = self._label(parts)
        crops, key = draws
        return partial(self._arrays, self._simclr(parts, crops), key, label)

    def _arrays(self, views: Work, key: int, label: int) -> dict[str, np.ndarray]:
        arrays = views()
        if self.augmix:
            arrays["images"] = augmix(arrays["images"], key)
        return {**arrays, "label": np.asarray(label, dtype=np.int64)}

    @cached_property
    def _simclr(self) -> SimclrTransform:
        return SimclrTransform(self.views, self.seed, max_pixels=self.max_pixels, num_views=1)

    def _label(self, parts: Mapping[str, Any]) -> int:
        text = bytes(parts.get("cls", b"")).strip()
        if not text.isdigit():
            raise BrokenImageError("no label (an integer in the part `cls`), which task classify needs")
        if int(text) >= self.num_classes:
            raise UserError(f"a sample has label {int(text)}, but task.num_classes={self.num_classes}")
        return int(text)


class Classify:
    """The task: see pretrain/tasks/__init__.py for what the trainer asks of it."""

    separable = True

    def __init__(self, config: PretrainConfig) -> None:
        from pretrain.data.colour import Colour

        assert isinstance(config.task, ClassifyTask)
        assert config.views is not None
        task = config.task
        classifier = make_classifier(config.model.name, config.model.args, task.num_classes)
        self.module: nn.Module = classifier
        self.backbone: nn.Module = classifier
        self.transform = ClassifyTransform(
            config.views, config.seed, task.num_classes, config.data.max_pixels, augmix=task.augmix
        )
        self._smoothing = task.label_smoothing
        mean_std = classifier.pretrained_cfg
        self._colour = Colour(config.views, mean_std["mean"], mean_std["std"])
        start_shape = getattr(classifier, "start_shape", None)
        self._start_shape = None if start_shape is None else start_shape(config.views.size)

    def embed(self, batch: Batch) -> Tensor:
        """Logits [b, K]."""
        with torch.autocast(batch.device.type, enabled=False):
            images = self._colour(batch).flatten(0, 1)  # [b, 3, S, S]
            start = None if self._start_shape is None else batch.starts(self._start_shape)
        return self.module(images) if start is None else self.module(images, start)

    def loss(self, embeddings: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy, and top-1 accuracy on the augmented images."""
        labels = batch.tensors["label"]
        loss = F.cross_entropy(embeddings.float(), labels, label_smoothing=self._smoothing)
        return loss, {"accuracy": (embeddings.argmax(1) == labels).float().mean()}


def make_classifier(name: str, arguments: dict[str, Any], num_classes: int) -> Any:
    """A classifier by its timm name, with fresh weights.

    Raises:
        UserError: timm does not know it, or it does not take the arguments.
    """
    import timm

    import pretrain  # noqa: F401  (registers the models of this project)

    try:
        return timm.create_model(name, pretrained=False, **{"num_classes": num_classes, **arguments})
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"model.name={name} with model.args={arguments}: {error}") from error


def augmix(images: np.ndarray, key: int) -> np.ndarray:
    """Mix three chains of random image operations into each view, uint8 [V, 3, S, S], by torchvision's AugMix."""
    from torchvision.transforms import AugMix

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key & ((1 << 63) - 1))
        mixed = [AugMix()(view) for view in torch.from_numpy(images)]
    return torch.stack(mixed).numpy()
