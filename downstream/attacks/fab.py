"""Fast adaptive boundary attack, targeted form (part of AutoAttack): the nearest misclassified image.

Source: Croce, Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack", arXiv 1907.02044,
algorithm 1. The classifier is linearised at the current image; that and the clean image are projected onto the plane
where the target overtakes the true class, inside [0, 1]; their mix is the next image, pulled back toward the clean one
when it is misclassified. The box-constrained projections are found by bisection on their one multiplier.

For a deterministic classifier only: with random starts there is no boundary to project on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from downstream.attacks.ball import Norm, length
from downstream.attacks.losses import margin, toward
from downstream.attacks.victim import Victim

_ALPHA, _BETA, _ETA = 0.1, 0.9, 1.05


def fab(victim: Victim, clean: Tensor, labels: Tensor, targets: Tensor, norm: Norm, *, steps: int = 100) -> Tensor:
    """Search the nearest image [B, 3, H, W] that is misclassified, going toward classes `targets` [B].

    Returns: that image, or the clean one where none was found.
    """
    images, found = clean.clone(), clean.clone()
    shortest = clean.new_full((len(clean),), float("inf"))
    loss = toward(targets)
    for _ in range(steps):
        answer = victim.differentiate(images, labels, loss)
        here = to_plane(images, answer.gradient, -answer.loss, norm)
        rise = (answer.gradient * (clean - images)).flatten(1).sum(1)
        there = to_plane(clean, answer.gradient, -answer.loss - rise, norm)
        near, far = length(here, norm), length(there, norm)
        alpha = (near / (near + far).clamp_min(1e-12)).clamp(0, _ALPHA)
        images = (1 - alpha) * (images + _ETA * here) + alpha * (clean + _ETA * there)
        images = images.clamp(0, 1)
        wrong = victim.score(images, labels, margin).fooled > 0
        distance = length(images - clean, norm).flatten()
        better = wrong & (distance < shortest)
        found[better], shortest[better] = images[better], distance[better]
        pull = torch.where(wrong, _BETA, 1.0).view(-1, *[1] * (clean.ndim - 1)).to(images.dtype)
        images = (1 - pull) * clean + pull * images
    return found


def to_plane(images: Tensor, gradient: Tensor, rise: Tensor, norm: Norm, *, iterations: int = 40) -> Tensor:
    """The shortest offset d with <gradient, d> = rise and images + d in [0, 1]: [B, ...], [B, ...], [B] -> [B, ...].

    Its form is clamp(t * u, -images, 1 - images) with u the steepest direction and one t for each image, by bisection.
    Where no such offset exists the one that comes nearest is returned.
    """
    direction = gradient * rise.sign().view(-1, *[1] * (images.ndim - 1))
    unit = direction.sign() if norm == "linf" else direction / length(direction, "l2").clamp_min(1e-12)
    low, high = -images, 1 - images
    shape = (-1, *[1] * (images.ndim - 1))
    least, most = torch.zeros_like(rise), _longest(unit)
    for _ in range(iterations):
        middle = (least + most) / 2
        reached = (gradient * (middle.view(shape) * unit).clamp(low, high)).flatten(1).sum(1)
        enough = reached.abs() >= rise.abs()
        least, most = torch.where(enough, least, middle), torch.where(enough, middle, most)
    return (most.view(shape) * unit).clamp(low, high)


def _longest(unit: Tensor) -> Tensor:
    """A multiplier at which every coordinate that moves has reached the edge of [0, 1]."""
    smallest = torch.where(unit == 0, torch.inf, unit.abs()).flatten(1).amin(1)
    return (1 / smallest).clamp(1, 1e6).nan_to_num(1.0)
