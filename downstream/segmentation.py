"""A linear probe of the map: semantic segmentation by one linear layer on frozen tokens.

Owns: token labels (the most frequent class of a token's pixels), the training of heads on them, and mIoU over classes
at the images' resolution: logits are enlarged bilinearly; ignored pixels are left out; the background is a class.

B images, D channels, h x w tokens, H x W pixels, R rates, G classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.errors import UserError
from configs.presets import Preset
from downstream import probe
from downstream.encoder import Encoder
from downstream.metrics import IGNORE, by_token
from downstream.samples import CLASSES, Samples, Scene

MOST_TOKENS = 1_000_000  # training tokens kept: images beyond are thinned evenly


def probe_segmentation(
    encoder: Encoder,
    train: Samples,
    test: Samples,
    preset: Preset,
    *,
    rates: Sequence[float],
    epochs: int,
    held_out: float,
    batch_size: int,
    seed: int = 0,
) -> dict[str, object]:
    """Train heads on the tokens of `train`, choose by held-out token accuracy, score on `test`.

    Returns:
        miou (mean over classes that occur), classes (IoU of each, NaN where it does not occur), rate, token_accuracy.

    Raises:
        UserError: no token has a class, or features are not finite.
    """
    tokens, labels = token_table(encoder, train, preset, batch_size=batch_size, seed=seed)
    if not len(labels):
        raise UserError(f"{train.location}: no token has a class, all are ignored")
    if not bool(torch.isfinite(tokens).all()):
        raise UserError(f"{encoder.name}: features are not finite: the backbone diverged or its weights are damaged")
    classes = int(labels.max()) + 1
    kept, held = probe.split(labels, held_out, seed=seed)
    tokens, labels = tokens.to(encoder.device), labels.to(encoder.device)
    options = {"classes": classes, "epochs": epochs, "batch_size": 4096, "seed": seed}
    heads = probe.train(tokens[kept], labels[kept], rates=rates, **options)
    accuracy = probe.evaluate(heads, tokens[held], labels[held]).top1
    best = int(accuracy.argmax())
    chosen = probe.train(tokens, labels, rates=[rates[best]], **options)
    table = torch.zeros(0, 0, dtype=torch.long)
    for block in test.blocks(batch_size):
        table = _sum(table, confusion(encoder, chosen, test.scenes(block, preset)))
    scores = class_iou(table)
    return {
        "miou": float(scores.nanmean()),
        "classes": scores.tolist(),
        "rate": rates[best],
        "token_accuracy": float(accuracy[best]),
    }


def token_table(
    encoder: Encoder, samples: Samples, preset: Preset, *, batch_size: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Features [M, D] and classes [M] of the tokens of a data set that are not ignored."""
    generator = torch.Generator().manual_seed(seed)
    features, labels = [], []
    for block in samples.blocks(batch_size):
        scene = samples.scenes(block, preset)
        maps = encoder.encode(scene.images).map.cpu()
        classes = token_classes(_classes(scene), (maps.shape[2], maps.shape[3])).flatten()
        share = min(1.0, MOST_TOKENS * len(block) / len(samples) / len(classes))
        use = (classes != IGNORE) & (torch.rand(len(classes), generator=generator) < share)
        features.append(maps.flatten(2).mT.flatten(0, 1)[use])
        labels.append(classes[use])
    return torch.cat(features), torch.cat(labels)


def token_classes(classes: Tensor, grid: tuple[int, int]) -> Tensor:
    """The most frequent label of each token's pixels, [B, h * w]; IGNORE where most are ignored."""
    return by_token(classes + 1, grid).argmax(1) - 1


def confusion(encoder: Encoder, heads: probe.Heads, scene: Scene) -> Tensor:
    """Pixels by (true class, predicted class), [G, G]."""
    maps = encoder.encode(scene.images).map
    logits = heads.logits(maps.flatten(2).mT.flatten(0, 1))[:, 0]
    planes = logits.view(len(maps), -1, logits.shape[1]).mT.unflatten(2, (maps.shape[2], maps.shape[3]))
    truth = _classes(scene)
    predicted = F.interpolate(planes, size=truth.shape[1:], mode="bilinear", align_corners=False).argmax(1).cpu()
    size = max(int(truth.max()) + 1, logits.shape[1])
    valid = truth != IGNORE
    return torch.bincount(truth[valid] * size + predicted[valid], minlength=size * size).view(size, size)


def class_iou(table: Tensor) -> Tensor:
    """IoU of each class from pixels by (true, predicted); NaN for classes that never occur in the truth."""
    table = table.double()
    hit = table.diagonal()
    union = table.sum(0) + table.sum(1) - hit
    return torch.where(table.sum(1) > 0, hit / union, torch.nan)


def _sum(one: Tensor, other: Tensor) -> Tensor:
    size = max(len(one), len(other))
    wide = [F.pad(table, (0, size - len(table), 0, size - len(table))) for table in (one, other)]
    return wide[0] + wide[1]


def _classes(scene: Scene) -> Tensor:
    assert scene.classes is not None, f"the shards were opened with needs=({CLASSES},)"
    return scene.classes
