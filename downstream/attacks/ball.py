"""The set an attacker may choose from: images in [0, 1] within eps of the clean one, in the Linf or the L2 norm.

Shapes: B images [B, 3, H, W] in [0, 1]; eps in the same unit (8/255 is usual for Linf, 0.5 for L2, CIFAR-10).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["linf", "l2"]


@dataclass(frozen=True)
class Ball:
    """All images within `eps` of a clean one."""

    norm: Norm
    eps: float

    def project(self, images: Tensor, clean: Tensor) -> Tensor:
        """Move images into the ball and into [0, 1]: [B, ...] -> [B, ...].

        For L2 the offset is shortened and then clamped, which is inside both sets, if not the nearest such point.
        """
        offset = images - clean
        if self.norm == "linf":
            offset = offset.clamp(-self.eps, self.eps)
        else:
            offset = offset * (self.eps / length(offset, "l2").clamp_min(1e-12)).clamp_max(1)
        return (clean + offset).clamp(0, 1)

    def steepest(self, gradient: Tensor) -> Tensor:
        """The unit step that raises a function most: the gradient's sign, or its direction."""
        if self.norm == "linf":
            return gradient.sign()
        return gradient / length(gradient, "l2").clamp_min(1e-12)

    def sample(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        """Random images of the ball: uniform for Linf; random direction, uniform in volume, for L2."""
        noise = torch.empty_like(clean)
        if self.norm == "linf":
            noise.uniform_(-self.eps, self.eps, generator=generator)
        else:
            noise.normal_(generator=generator)
            radius = torch.rand(len(clean), generator=generator, device=clean.device)
            radius = radius.pow(1 / clean[0].numel()).view(-1, *[1] * (clean.ndim - 1))
            noise = noise / length(noise, "l2").clamp_min(1e-12) * radius * self.eps
        return (clean + noise).clamp(0, 1)


def length(offsets: Tensor, norm: Norm) -> Tensor:
    """Norms of offsets, kept broadcastable: [B, ...] -> [B, 1, ...]."""
    flat = offsets.flatten(1)
    values = flat.abs().amax(1) if norm == "linf" else flat.square().sum(1).sqrt()
    return values.view(-1, *[1] * (offsets.ndim - 1))
