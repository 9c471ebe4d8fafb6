"""What attacks raise: per-image losses of logits.

Source of DLR: Croce, Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks" (AutoAttack), arXiv 2003.01690, eq. (5) and (6).

Shapes: B images, K classes; logits [B, K], labels and targets int64 [B]; losses [B]: larger is worse.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p_y."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """max_{i != y} z_i - z_y: positive where the image is misclassified."""
    true = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], float("-inf"))
    return others.amax(1) - true[:, 0]


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio: (max_{i != y} z_i - z_y) / (z_(1) - z_(3)), blind to the logits' scale and shift."""
    ordered = logits.sort(dim=1, descending=True).values
    third = ordered[:, min(2, logits.shape[1] - 1)]
    return margin(logits, labels) / (ordered[:, 0] - third + 1e-12)


def targeted_dlr(targets: Tensor) -> Loss:
    """(z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2), toward classes `targets`."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        ordered = logits.sort(dim=1, descending=True).values
        last = logits.shape[1] - 1
        scale = ordered[:, 0] - (ordered[:, min(2, last)] + ordered[:, min(3, last)]) / 2
        return toward(targets)(logits, labels) / (scale + 1e-12)

    return loss


def toward(targets: Tensor) -> Loss:
    """z_t - z_y."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.gather(1, targets[:, None]) - logits.gather(1, labels[:, None]))[:, 0]

    return loss
