"""SimCLR: two random views of an image attract, views of different images repel.

"A Simple Framework for Contrastive Learning of Visual Representations", Chen et al., arXiv 2002.05709. The projector is
that of published AKOrN (arXiv 2410.13821): Linear(C, 4C) -> ReLU -> Linear(4C, C) on the max-pooled readout. The loss
is in nt_xent.py.

Deviation: the initial oscillators of a view are keyed by the sample, not drawn from a stream, so that neither rank,
chunk nor order of computation changes them.

Legend: b images, V = 2 views, S side of a view, N tokens, C channels, d embedding size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import PretrainConfig
from configs.tasks import SimclrTask
from pretrain.representation import describe
from pretrain.tasks.nt_xent import gather, nt_xent

if TYPE_CHECKING:
    from pretrain.data.batch import Batch


class Contrastive(nn.Module):
    """A backbone that pools, and the projector behind it."""

    def __init__(self, backbone: nn.Module, features: int, hidden: int, out: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, out))

    def forward(self, images: Tensor, start: Tensor | None = None) -> Tensor:
        """Normalised images [B, 3, S, S] and initial oscillators [B, N, C] -> embeddings [B, d]."""
        pooled = self.backbone(images) if start is None else self.backbone(images, start)
        return self.projector(pooled)


class Simclr:
    """The task: see pretrain/tasks/__init__.py for what the trainer asks of it."""

    separable = False

    def __init__(self, config: PretrainConfig) -> None:
        from pretrain.data.colour import Colour
        from pretrain.data.views import SimclrTransform

        assert isinstance(config.task, SimclrTask)
        assert config.views is not None
        self._temperature = config.task.temperature
        self.backbone = make_backbone(config)
        features = _num_features(self.backbone, config.model.name)
        self.module = Contrastive(
            self.backbone,
            features,
            config.task.projector_hidden or 4 * features,
            config.task.projector_out or features,
        )
        self.transform = SimclrTransform(config.views, config.seed, max_pixels=config.data.max_pixels)
        mean_std = self.backbone.pretrained_cfg
        self._colour = Colour(config.views, mean_std["mean"], mean_std["std"])
        start_shape = getattr(self.backbone, "start_shape", None)
        self._start_shape = None if start_shape is None else start_shape(config.views.size)

    def embed(self, batch: Batch) -> Tensor:
        """Embeddings [b, 2, d] of both views of the samples."""
        with torch.autocast(batch.device.type, enabled=False):
            images = self._colour(batch)  # [b, V, 3, S, S]
            start = None if self._start_shape is None else self._starts(batch, self._start_shape)
        return self.module(images.flatten(0, 1), start).unflatten(0, (-1, 2))

    @staticmethod
    def _starts(batch: Batch, shape: tuple[int, int]) -> Tensor:
        starts = [batch.starts(shape, view) for view in (0, 1)]
        return torch.stack(starts, 1).flatten(0, 1)  # [b * V, N, C]

    def loss(self, embeddings: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """NT-Xent of the global batch (collective)."""
        samples = batch.samples.to(embeddings.device, non_blocking=True)
        loss, accuracy = nt_xent(embeddings, samples, temperature=self._temperature)
        return loss, {"accuracy": accuracy}

    @staticmethod
    def describe(embeddings: Tensor) -> dict[str, Tensor]:
        """Alignment, uniformity and effective rank, whatever the ranks, of the first images of the global batch
        (collective). Of a rank's own images alone they would depend on how many it has."""
        return describe(gather(embeddings.float()))


def make_backbone(config: PretrainConfig) -> Any:
    """Return the backbone that the configuration names, without a classifier.

    Raises:
        UserError: timm does not know it, or it does not take the arguments.
    """
    import timm

    import pretrain  # noqa: F401  (registers the models of this project)

    arguments: dict[str, Any] = dict(config.model.args)
    try:
        return timm.create_model(config.model.name, pretrained=False, num_classes=0, **arguments)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"model.name={config.model.name} with model.args={config.model.args}: {error}") from error


def _num_features(backbone: Any, name: str) -> int:
    features = getattr(backbone, "head_hidden_size", None) or getattr(backbone, "num_features", None)
    if not isinstance(features, int):
        raise UserError(f"model.name={name} does not say how many features it has; choose an image backbone of timm's")
    return features
