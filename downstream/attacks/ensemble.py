"""AutoAttack (arXiv 2003.01690): four attacks in turn, each on the images that the ones before could not break.

`standard`, for a deterministic classifier or a fixed start: APGD on cross-entropy, APGD on targeted DLR (the 9
likeliest wrong classes), FAB toward the same classes, Square with 5,000 queries. `rand`, for random starts: APGD on
cross-entropy and on DLR with the gradient averaged over 20 draws. Parts, order and steps are the published ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from downstream.attacks.apgd import apgd
from downstream.attacks.ball import Ball, length
from downstream.attacks.fab import fab
from downstream.attacks.losses import cross_entropy, dlr, targeted_dlr
from downstream.attacks.square import square
from downstream.attacks.victim import Victim

Part = Callable[[Victim, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Budget:
    """How long each part searches; the published values."""

    steps: int = 100
    targets: int = 9
    queries: int = 5000


@dataclass(frozen=True)
class Outcome:
    """images: the worst ones found [B, 3, H, W]; broken_by [B]: number of the part that broke each, -1: none; names."""

    images: Tensor
    broken_by: Tensor
    names: tuple[str, ...]


def autoattack(victim: Victim, clean: Tensor, labels: Tensor, ball: Ball, *, budget: Budget | None = None) -> Outcome:
    """Attack images [B, 3, H, W] in turn. An image counts as broken where at least half of the draws misclassify it,
    and is attacked on until all do: half of them right would otherwise count as robust when it is scored.

    Images that are misclassified without an attack come back as they are, broken by part 0, "clean". Square has no L2
    form here and is left out there.
    """
    names, images, fooled = ["clean"], clean.clone(), _fooled(victim, clean, labels)
    broken_by = torch.where(fooled >= 0.5, 0, -1)
    for name, part in parts(victim, clean, labels, ball, budget or Budget()):
        rows = (fooled < 1).nonzero().flatten()
        if name not in names:
            names.append(name)
        if len(rows):
            tried = part(rows)
            found = _fooled(victim, tried, labels[rows])
            worse = found > fooled[rows]
            images[rows[worse]], fooled[rows[worse]] = tried[worse], found[worse]
            broken_by[rows[(broken_by[rows] < 0) & (found >= 0.5)]] = names.index(name)
    return Outcome(images, broken_by, tuple(names))


def parts(
    victim: Victim, clean: Tensor, labels: Tensor, ball: Ball, budget: Budget
) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Name and function of each part; a function attacks the images of the given rows."""

    def plain(attack: Callable[..., Tensor], rows: Tensor) -> Tensor:
        return attack(victim, clean[rows], labels[rows], ball)

    yield "apgd-ce", partial(plain, partial(apgd, loss=cross_entropy, steps=budget.steps))
    if victim.draws:
        yield "apgd-dlr", partial(plain, partial(apgd, loss=dlr, steps=budget.steps))
        return
    order = _likeliest(victim, clean, labels)[:, : budget.targets]
    for rank in range(order.shape[1]):
        yield "apgd-t", partial(_targeted_apgd, victim, clean, labels, ball, order[:, rank], budget.steps)
    for rank in range(order.shape[1]):
        yield "fab-t", partial(_targeted_fab, victim, clean, labels, ball, order[:, rank], budget.steps)
    if ball.norm == "linf":
        yield "square", partial(plain, partial(square, queries=budget.queries))


def _targeted_apgd(
    victim: Victim, clean: Tensor, labels: Tensor, ball: Ball, targets: Tensor, steps: int, rows: Tensor
) -> Tensor:
    return apgd(victim, clean[rows], labels[rows], ball, loss=targeted_dlr(targets[rows]), steps=steps)


def _targeted_fab(
    victim: Victim, clean: Tensor, labels: Tensor, ball: Ball, targets: Tensor, steps: int, rows: Tensor
) -> Tensor:
    found = fab(victim, clean[rows], labels[rows], targets[rows], ball.norm, steps=steps)
    inside = length(found - clean[rows], ball.norm) <= ball.eps * (1 + 1e-6)
    return torch.where(inside, found, clean[rows])


def _likeliest(victim: Victim, clean: Tensor, labels: Tensor) -> Tensor:
    """Wrong classes of each image, likeliest first: [B, K - 1]."""
    chances = victim.probabilities(clean).mean(0).scatter(1, labels[:, None], -1.0)
    return chances.argsort(1, descending=True)[:, :-1]


def _fooled(victim: Victim, images: Tensor, labels: Tensor) -> Tensor:
    """Share of the draws that misclassify: [B]."""
    return victim.score(images, labels, cross_entropy).fooled
