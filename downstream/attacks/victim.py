"""The classifier under attack: images in [0, 1] to logits, under one fixed start or many random ones.

Owns: how randomness of the model (initial oscillators) meets the attacker. A random start can hide the gradient without
making the model more robust (obfuscated gradients, arXiv 1802.00420). So there are two honest settings: the attacker
averages gradients over many starts (expectation over transformations, EoT), or the start is fixed and known to it.

Shapes: B images [B, 3, H, W] in [0, 1], K classes, E draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from downstream.attacks.losses import Loss


@dataclass(frozen=True)
class Answer:
    """Means over the draws: loss [B], its gradient at the images [B, 3, H, W], share of draws that misclassify [B]."""

    loss: Tensor
    gradient: Tensor
    fooled: Tensor


class Victim:
    """A classifier with its normalisation. Counts the forward passes it is asked for, in `queries` (images x draws)."""

    def __init__(
        self, model: nn.Module, *, mean: tuple[float, ...], std: tuple[float, ...], draws: int = 0, seed: int = 0
    ) -> None:
        """
        Args:
            model: in eval mode; its parameters should not require gradients.
            mean, std: the model's normalisation, by channel.
            draws: 0: one fixed start (the model's own), or E >= 1 random starts for every query.
            seed: of the random starts.
        """
        self.model, self.draws, self.seed, self.queries = model, draws, seed, 0
        device = next(model.parameters()).device
        self._mean = torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self._std = torch.tensor(std, device=device).view(1, -1, 1, 1)
        self._generator = torch.Generator(device).manual_seed(seed)

    def with_draws(self, draws: int, *, seed: int) -> Victim:
        """The same classifier asked in another way."""
        mean, std = (tuple(values.flatten().tolist()) for values in (self._mean, self._std))
        return Victim(self.model, mean=mean, std=std, draws=draws if self.is_random else 0, seed=seed)

    @property
    def is_random(self) -> bool:
        """Whether the model has a start at all."""
        return self._start_shape(None) is not None

    def ask(self, images: Tensor) -> Tensor:
        """Logits [B, K] of one draw."""
        self.queries += len(images)
        normal = (images - self._mean) / self._std
        if not self.draws:
            return self.model(normal)
        shape = self._start_shape((int(images.shape[-2]), int(images.shape[-1])))
        assert shape is not None, "a model without oscillators has no draws"
        start = torch.randn(len(images), *shape, generator=self._generator, device=images.device)
        return self.model(normal, start=start)

    def _start_shape(self, size: tuple[int, int] | None) -> tuple[int, ...] | None:
        """Shape of a start for images of this size, None for models without one."""
        method: Callable[..., tuple[int, ...] | None] | None = getattr(self.model, "start_shape", None)
        return method(size) if method is not None else None

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """Class probabilities of each draw: [E, B, K] (E = 1 for a fixed start)."""
        return torch.stack([self.ask(images).float().softmax(1) for _ in range(max(1, self.draws))])

    @torch.no_grad()
    def score(self, images: Tensor, labels: Tensor, loss: Loss) -> Answer:
        """Mean loss and share of draws fooled, without a gradient (it is returned empty)."""
        total, wrong = images.new_zeros(len(images)), images.new_zeros(len(images))
        count = max(1, self.draws)
        for _ in range(count):
            logits = self.ask(images)
            total += loss(logits, labels)
            wrong += logits.argmax(1) != labels
        return Answer(total / count, images.new_zeros(0), wrong / count)

    def differentiate(self, images: Tensor, labels: Tensor, loss: Loss) -> Answer:
        """Mean loss over the draws, its gradient with respect to the images, and the share of draws fooled.

        Each draw's graph is freed before the next one is built: memory does not grow with the draws.
        """
        total, wrong = images.new_zeros(len(images)), images.new_zeros(len(images))
        gradient, count = torch.zeros_like(images), max(1, self.draws)
        for _ in range(count):
            leaf = images.detach().requires_grad_()
            logits = self.ask(leaf)
            values = loss(logits, labels)
            gradient += torch.autograd.grad(values.sum(), leaf)[0]
            total += values.detach()
            wrong += logits.detach().argmax(1) != labels
        return Answer(total / count, gradient / count, wrong / count)
