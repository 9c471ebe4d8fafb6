"""Linear probes: many heads on frozen features, trained at once.

Owns: heads for every learning rate as the rows of one matrix, their training (SGD with momentum, cosine schedule,
gradients in closed form), and the choice among them. Features are standardised by the statistics of the training set,
so that one range of learning rates serves all backbones.

N images, D features, G classes, R rates. Heads: one matrix [G * R, D].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 4096  # rows centred at a time


@dataclass(frozen=True)
class Heads:
    """Linear classifiers on standardised features.

    Attributes: weight [G, R, D]; bias [G, R]; mean, scale [D] of the training features.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Features [B, D] -> [B, R, G]."""
        return _scores(self.weight, self.bias, (features - self.mean) * self.scale).permute(2, 1, 0)


def train(
    features: Tensor,
    labels: Tensor,
    *,
    rates: Sequence[float],
    classes: int,
    epochs: int = 30,
    batch_size: int = 1024,
    momentum: float = 0.9,
    seed: int = 0,
) -> Heads:
    """Train one head per learning rate on features [N, D] with labels [N].

    Args:
        rates: for batches of 256; they are scaled in proportion to the batch.
    """
    device, generator = features.device, torch.Generator().manual_seed(seed)
    mean, scale = _statistics(features)
    batch_size = min(batch_size, len(features))
    rate = torch.tensor(rates, device=device)[:, None] * (batch_size / 256)
    weight = torch.zeros(classes, len(rates), features.shape[1], device=device)
    bias = torch.zeros(classes, len(rates), 1, device=device)
    moments = torch.zeros_like(weight), torch.zeros_like(bias)
    steps_per_epoch = len(features) // batch_size
    total, step = epochs * steps_per_epoch, 0
    for _ in range(epochs):
        order = torch.randperm(len(features), generator=generator).to(device)
        for chosen in order.split(batch_size)[:steps_per_epoch]:
            inputs = (features[chosen] - mean).mul_(scale)
            error = _error(_scores(weight, bias[:, :, 0], inputs), labels[chosen])
            now = rate * (0.5 * (1 + math.cos(math.pi * step / total)))
            for value, moment, gradient in (
                (weight, moments[0], (error.flatten(0, 1) @ inputs).view_as(weight)),
                (bias, moments[1], error.sum(2, keepdim=True)),
            ):
                moment.mul_(momentum).add_(gradient)
                value.sub_(now * moment)
            step += 1
    return Heads(weight, bias[:, :, 0], mean, scale)


def _statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation of each column; the squares are summed about the mean, block by block."""
    mean = features.mean(0)
    variance = torch.stack([(block - mean).square_().sum(0) for block in features.split(_ROWS)]).sum(0)
    return mean, 1 / (variance / max(1, len(features) - 1)).sqrt().clamp_min(1e-6)


def _scores(weight: Tensor, bias: Tensor, inputs: Tensor) -> Tensor:
    """Logits [G, R, B] of inputs [B, D]: images come last, where the softmax over classes runs over vectors."""
    return torch.addmm(bias.reshape(-1, 1), weight.flatten(0, 1), inputs.mT).unflatten(0, bias.shape)


def _error(logits: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the mean cross-entropy of each head with respect to its logits: softmax - one-hot, [G, R, B]."""
    error = logits.softmax(0)
    error[labels, :, torch.arange(len(labels), device=labels.device)] -= 1
    return error.div_(len(labels))


@dataclass(frozen=True)
class Accuracy:
    """Attributes: top1, top5 and ece (expected calibration error, 15 bins), each [R] in [0, 1]."""

    top1: Tensor
    top5: Tensor
    ece: Tensor


def evaluate(heads: Heads, features: Tensor, labels: Tensor, *, batch_size: int = 4096) -> Accuracy:
    """Accuracy of each head on features [N, D] with labels [N]."""
    top1, top5, confidence = [], [], []
    for start in range(0, len(features), batch_size):
        probability = heads.logits(features[start : start + batch_size]).softmax(2)
        ranked = probability.topk(min(5, probability.shape[2]), dim=2)
        hit = ranked.indices == labels[start : start + batch_size, None, None]
        top1.append(hit[:, :, 0])
        top5.append(hit.any(2))
        confidence.append(ranked.values[:, :, 0])
    correct = torch.cat(top1).float()
    ece = torch.stack([calibration_error(c, h) for c, h in zip(torch.cat(confidence).T, correct.T)])
    return Accuracy(correct.mean(0), torch.cat(top5).float().mean(0), ece)


def calibration_error(confidence: Tensor, correct: Tensor, *, bins: int = 15) -> Tensor:
    """Expected calibration error (Guo et al., arXiv 1706.04599): sum over bins of share * |accuracy - confidence|."""
    place = (confidence * bins).long().clamp(0, bins - 1)
    gap = torch.zeros(bins, device=confidence.device).scatter_add_(0, place, correct.float() - confidence)
    return gap.abs().sum() / len(confidence)


def split(labels: Tensor, share: float, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Positions of the training and the held-out part, `share` of each class held out.

    At least one image of a class is, and at least one is not: a class with one image has none to hold out.
    """
    generator = torch.Generator().manual_seed(seed)
    kept, held = [labels.new_empty(0)], [labels.new_empty(0)]
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held.append(members[:count])
        kept.append(members[count:])
    return torch.cat(kept).sort().values, torch.cat(held).sort().values
