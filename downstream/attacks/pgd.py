"""FGSM (arXiv 1412.6572) and projected gradient ascent (PGD, arXiv 1706.06083), for both norms and any draws."""

from __future__ import annotations

import torch
from torch import Tensor

from downstream.attacks.ball import Ball
from downstream.attacks.losses import Loss, cross_entropy
from downstream.attacks.victim import Answer, Victim


class Best:
    """The worst images found so far: by the share of draws they fool, then by their loss."""

    def __init__(self, clean: Tensor) -> None:
        self.images = clean.clone()
        self.fooled = clean.new_full((len(clean),), -1.0)
        self.loss = clean.new_full((len(clean),), float("-inf"))

    def update(self, images: Tensor, answer: Answer) -> None:
        """Take over the images that are worse than the ones held."""
        worse = (answer.fooled > self.fooled) | ((answer.fooled == self.fooled) & (answer.loss > self.loss))
        self.images[worse] = images[worse]
        self.fooled[worse], self.loss[worse] = answer.fooled[worse], answer.loss[worse]


def fgsm(victim: Victim, clean: Tensor, labels: Tensor, ball: Ball) -> Tensor:
    """One full step along the steepest direction. [B, 3, H, W] -> adversarial images of the same shape."""
    answer = victim.differentiate(clean, labels, cross_entropy)
    return ball.project(clean + ball.eps * ball.steepest(answer.gradient), clean)


def pgd(
    victim: Victim,
    clean: Tensor,
    labels: Tensor,
    ball: Ball,
    *,
    steps: int = 40,
    loss: Loss = cross_entropy,
    seed: int = 0,
) -> Tensor:
    """Gradient ascent in the ball from a random point, keeping the worst point seen.

    Args:
        steps: gradient steps, each with `victim.draws` forward and backward passes.
    """
    generator = torch.Generator(clean.device).manual_seed(seed)
    size = 2.5 * ball.eps / steps  # together they can cross the ball
    images, best = ball.sample(clean, generator), Best(clean)
    for _ in range(steps):
        answer = victim.differentiate(images, labels, loss)
        best.update(images, answer)
        images = ball.project(images + size * ball.steepest(answer.gradient), clean)
    best.update(images, victim.score(images, labels, loss))
    return best.images
