"""Square attack: random search with squares at the edge of the Linf ball; no gradients (part of AutoAttack).

Source: Andriushchenko, Croce, Flammarion, Hein, arXiv 1912.00049, algorithms 1 and 2. It cannot be fooled by a gradient
that leads nowhere: where it beats a gradient attack, gradients are masked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from downstream.attacks.ball import Ball
from downstream.attacks.losses import margin
from downstream.attacks.pgd import Best
from downstream.attacks.victim import Victim

# Queries (of 10,000) after which the share of pixels that change is halved.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def share_at(step: int, queries: int, *, first: float = 0.8) -> float:
    """Share of an image's pixels inside the square at a step."""
    return first / 2 ** sum(step / queries * 10_000 > limit for limit in _HALVINGS)


def square(victim: Victim, clean: Tensor, labels: Tensor, ball: Ball, *, queries: int = 5000, seed: int = 0) -> Tensor:
    """Attack images [B, 3, H, W] with so many queries each (times `victim.draws`). Linf only."""
    assert ball.norm == "linf"
    generator = torch.Generator(clean.device).manual_seed(seed)
    size, channels, height, width = clean.shape
    stripes = _signs((size, channels, 1, width), clean, generator)
    images, best = (clean + ball.eps * stripes).clamp(0, 1), Best(clean)
    best.update(images, victim.score(images, labels, margin))
    for step in range(1, queries):
        going = (best.fooled < 1).nonzero().flatten()
        if not len(going):
            break
        side = max(1, min(round((share_at(step, queries) * height * width) ** 0.5), height - 1, width - 1))
        offsets = best.images[going] - clean[going]
        mask = _squares(len(going), height, width, side, clean.device, generator)
        fresh = ball.eps * _signs((len(going), channels, 1, 1), clean, generator)
        tried = (clean[going] + torch.where(mask, fresh, offsets)).clamp(0, 1)
        answer = victim.score(tried, labels[going], margin)
        part = Best(clean[going])
        part.images, part.fooled, part.loss = best.images[going], best.fooled[going], best.loss[going]
        part.update(tried, answer)
        best.images[going], best.fooled[going], best.loss[going] = part.images, part.fooled, part.loss
    return best.images


def _squares(
    count: int, height: int, width: int, side: int, device: torch.device, generator: torch.Generator
) -> Tensor:
    """One random square for each image: bool [count, 1, height, width]."""
    top = torch.randint(height - side + 1, (count, 1), generator=generator, device=device)
    left = torch.randint(width - side + 1, (count, 1), generator=generator, device=device)
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    inside_rows = (rows >= top) & (rows < top + side)
    inside_columns = (columns >= left) & (columns < left + side)
    return (inside_rows[:, :, None] & inside_columns[:, None, :])[:, None]


def _signs(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs."""
    return torch.randint(0, 2, shape, generator=generator, device=like.device).to(like.dtype) * 2 - 1
