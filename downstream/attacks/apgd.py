"""Auto-PGD: projected gradient ascent with momentum that halves its own step (part of AutoAttack).

Source: Croce, Hein, arXiv 2003.01690, section 3 and algorithm 1. The step starts at 2 eps; at checkpoints it is halved,
and the search goes back to the best point, if too few steps raised the loss (rho = 0.75) or if neither the step nor the
best loss has changed since the last checkpoint.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from downstream.attacks.ball import Ball
from downstream.attacks.losses import Loss
from downstream.attacks.pgd import Best
from downstream.attacks.victim import Victim

_MOMENTUM = 0.75
_RHO = 0.75


def checkpoints(steps: int) -> list[int]:
    """Steps of review: `steps` times p_1 = .22, p_{j+1} = p_j + max(p_j - p_{j-1} - .03, .06)."""
    shares = [0.0, 0.22]
    while shares[-1] <= 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return [math.ceil(share * steps - 1e-9) for share in shares if share <= 1]


def apgd(
    victim: Victim, clean: Tensor, labels: Tensor, ball: Ball, *, loss: Loss, steps: int = 100, seed: int = 0
) -> Tensor:
    """Attack images [B, 3, H, W]; returns the worst ones found.

    Args:
        loss: raised; cross-entropy, DLR or targeted DLR in AutoAttack.
        steps: gradient steps, each with `victim.draws` forward and backward passes.
    """
    generator = torch.Generator(clean.device).manual_seed(seed)
    images, best = ball.sample(clean, generator), Best(clean)
    state = _State(images, ball.eps)
    reviews = checkpoints(steps)
    previous = images
    for step in range(steps):
        answer = victim.differentiate(images, labels, loss)
        best.update(images, answer)
        state.record(images, answer.loss, answer.gradient)
        if step in reviews[1:]:
            restart = state.review(step - reviews[reviews.index(step) - 1])
            images = torch.where(restart, state.best_images, images)
            previous = torch.where(restart, state.best_images, previous)
            gradient = torch.where(restart, state.best_gradient, answer.gradient)
        else:
            gradient = answer.gradient
        ahead = ball.project(images + state.size * ball.steepest(gradient), clean)
        share = 1.0 if step == 0 else _MOMENTUM
        moved = images + share * (ahead - images) + (1 - share) * (images - previous)
        previous, images = images, ball.project(moved, clean)
    best.update(images, victim.score(images, labels, loss))
    return best.images


class _State:
    """Step size and best point of each image. Values are [B] or broadcastable to the images."""

    def __init__(self, images: Tensor, eps: float) -> None:
        self.best_images, self.best_gradient = images.clone(), torch.zeros_like(images)
        self.best_loss = images.new_full((len(images),), float("-inf"))
        self.size = images.new_full((len(images), *[1] * (images.ndim - 1)), 2 * eps)
        self._last_loss = -self.best_loss  # the first point is no rise
        self._rises = images.new_zeros(len(images))
        self._best_at_review = self.best_loss.clone()
        self._halved = torch.ones(len(images), dtype=torch.bool, device=images.device)

    def record(self, images: Tensor, loss: Tensor, gradient: Tensor) -> None:
        """Take note of the loss at the current images."""
        self._rises += loss > self._last_loss
        self._last_loss = loss
        better = loss > self.best_loss
        self.best_loss = torch.where(better, loss, self.best_loss)
        self.best_images[better], self.best_gradient[better] = images[better], gradient[better]

    def review(self, length: int) -> Tensor:
        """Halve the step where the search stalls. Returns where it did, broadcastable to the images."""
        stuck = ~self._halved & (self.best_loss <= self._best_at_review)
        halve = (self._rises < _RHO * length) | stuck
        self._halved, self._best_at_review = halve, self.best_loss.clone()
        self._rises.zero_()
        where = halve.view_as(self.size)
        self.size = torch.where(where, self.size / 2, self.size)
        self._last_loss = torch.where(halve, self.best_loss, self._last_loss)
        return where
