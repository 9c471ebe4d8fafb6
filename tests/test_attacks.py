"""Attacks against classifiers whose minimal perturbation is known in closed form."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from downstream.attacks import losses
from downstream.attacks.apgd import _State, apgd, checkpoints
from downstream.attacks.ball import Ball, length
from downstream.attacks.ensemble import Budget, autoattack
from downstream.attacks.fab import fab, to_plane
from downstream.attacks.pgd import fgsm, pgd
from downstream.attacks.square import share_at, square
from downstream.attacks.victim import Victim

CLASSES, SIDE = 5, 6
IDENTITY = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


class Linear(nn.Module):
    """z = W x + b."""

    def __init__(self, classes: int = CLASSES, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(classes, 3 * SIDE * SIDE, generator=generator), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(classes, generator=generator), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T + self.bias


class Masked(nn.Module):
    """Two classes, z = (0, <w, x> + s <v, x>) with the start s random: one draw's gradient points along v, not w."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(torch.randn(3 * SIDE * SIDE, generator=generator), requires_grad=False)
        v = torch.randn(3 * SIDE * SIDE, generator=generator)
        v -= (v @ self.w.sign()) / self.w.numel() * self.w.sign()
        self.v = nn.Parameter(8 * v, requires_grad=False)

    def start_shape(self, img_size: tuple[int, int] | None = None) -> tuple[int, int]:
        return (1, 1)

    def forward(self, images: Tensor, start: Tensor | None = None) -> Tensor:
        flat = images.flatten(1) - 0.5
        sign = torch.ones(len(flat)) if start is None else start.flatten(1)[:, 0].sign()
        score = flat @ self.w + sign * (flat @ self.v)
        return torch.stack([torch.zeros_like(score), score], 1)


@pytest.fixture
def victim() -> Victim:
    return Victim(Linear().eval(), **IDENTITY)


@pytest.fixture
def clean() -> Tensor:
    # Far from the edges of [0, 1], so that the box plays no part in the closed form.
    return 0.5 + 0.05 * torch.randn(16, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def minimal(model: Linear, images: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """Labels the model gives, and the distance to each other class: gap / dual norm of the weights' difference."""
    logits = model(images)
    labels = logits.argmax(1)
    gaps = logits.gather(1, labels[:, None]) - logits
    difference = model.weight[labels][:, None] - model.weight[None]
    dual = difference.abs().sum(-1) if norm == "linf" else difference.square().sum(-1).sqrt()
    distances = (gaps / dual).scatter(1, labels[:, None], float("inf"))
    return labels, distances


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    ("attack", "slack"), [("pgd", 1.05), ("apgd-margin", 1.02), ("apgd-dlr", 1.5), ("apgd-t", 1.05)]
)
def test_gradient_attacks_succeed_exactly_beyond_the_minimal_perturbation(
    attack: str, slack: float, norm: str, victim: Victim, clean: Tensor
) -> None:
    labels, distances = minimal(victim.model, clean, norm)
    nearest, targets = distances.min(1)
    for row in (0, 7):
        images, label, target = clean[row : row + 1], labels[row : row + 1], targets[row : row + 1]
        loss = {"apgd-dlr": losses.dlr, "apgd-t": losses.targeted_dlr(target)}.get(attack, losses.toward(target))
        for factor, fooled in ((0.97, False), (slack, True)):
            ball = Ball(norm, factor * nearest[row].item())
            run = partial(pgd, steps=60) if attack == "pgd" else partial(apgd, steps=100)
            found = run(victim, images, label, ball, loss=loss)
            assert length(found - images, norm).item() <= ball.eps * (1 + 1e-5)
            assert (victim.ask(found).argmax(1) != label).item() is fooled


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fab_finds_the_minimal_perturbation(norm: str, victim: Victim, clean: Tensor) -> None:
    labels, distances = minimal(victim.model, clean, norm)
    nearest, targets = distances.min(1)
    found = fab(victim, clean, labels, targets, norm, steps=40)
    reached = length(found - clean, norm).flatten()
    assert (victim.ask(found).argmax(1) != labels).all()
    assert (reached >= nearest * (1 - 1e-4)).all()
    assert (reached <= nearest * 1.02).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_onto_a_plane_inside_the_box(norm: str) -> None:
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(8, 3, SIDE, SIDE, generator=generator)
    gradient = torch.randn(8, 3, SIDE, SIDE, generator=generator)
    # Half of the largest rise the box allows: many coordinates are clamped.
    rise = 0.5 * torch.where(gradient > 0, gradient * (1 - images), -gradient * images).flatten(1).sum(1)
    offset = to_plane(images, gradient, rise, norm)
    assert (images + offset).min() >= -1e-6
    assert (images + offset).max() <= 1 + 1e-6
    torch.testing.assert_close((gradient * offset).flatten(1).sum(1), rise, rtol=1e-4, atol=1e-4)
    # Optimal: unclamped coordinates are t sign(g) (linf) or t g (l2) with one t for each image.
    shape = gradient.sign() if norm == "linf" else gradient
    for row in range(8):
        free = ((images + offset)[row] > 1e-4) & ((images + offset)[row] < 1 - 1e-4)
        t = (offset / shape)[row][free]
        assert t.numel() > 5
        torch.testing.assert_close(t, t.mean().expand_as(t), rtol=1e-3, atol=1e-5)


def test_fgsm_is_exact_for_two_classes() -> None:
    model = Linear(classes=2)
    victim = Victim(model.eval(), **IDENTITY)
    clean = torch.full((4, 3, SIDE, SIDE), 0.5) + 0.02 * torch.randn(4, 3, SIDE, SIDE)
    labels, distances = minimal(model, clean, "linf")
    for row in range(4):
        nearest = distances[row].amin().item()
        for factor, fooled in ((0.99, False), (1.01, True)):
            found = fgsm(victim, clean[row : row + 1], labels[row : row + 1], Ball("linf", factor * nearest))
            assert (victim.ask(found).argmax(1) != labels[row]).item() is fooled


def test_apgd_halves_where_fewer_than_three_quarters_of_the_steps_raise_the_loss() -> None:
    for rises, halved in ((15, False), (14, True)):  # of 20 steps: algorithm 1 counts f(x_{i+1}) > f(x_i)
        state = _State(torch.zeros(1, 3, 2, 2), 1.0)
        losses = [*range(rises + 1), *[0.5] * (20 - rises)]
        for loss in losses:
            state.record(torch.zeros(1, 3, 2, 2), torch.tensor([float(loss)]), torch.zeros(1, 3, 2, 2))
        assert state.review(20).item() is halved


def test_square_needs_no_gradient(victim: Victim, clean: Tensor) -> None:
    labels, distances = minimal(victim.model, clean, "linf")
    nearest = distances.amin(1).amax().item()
    far = square(victim, clean, labels, Ball("linf", 1.6 * nearest), queries=600)
    assert (victim.ask(far).argmax(1) != labels).float().mean() > 0.9
    near = square(victim, clean, labels, Ball("linf", 0.9 * distances.min().item()), queries=100)
    assert (victim.ask(near).argmax(1) == labels).all()
    assert (far - clean).abs().max() <= 1.6 * nearest + 1e-6


def test_schedules_are_the_published_ones() -> None:
    # Section 3.1 of arXiv 2003.01690 for 100 steps; appendix of arXiv 1912.00049 for 10,000 queries.
    assert checkpoints(100)[:6] == [0, 22, 41, 57, 70, 80]
    assert [round(share_at(step, 10_000), 5) for step in (1, 11, 51, 9000)] == [0.8, 0.4, 0.2, round(0.8 / 512, 5)]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_autoattack_breaks_exactly_what_can_be_broken(norm: str, victim: Victim, clean: Tensor) -> None:
    labels, distances = minimal(victim.model, clean, norm)
    nearest = distances.amin(1)
    eps = nearest.median().item() * 1.0001
    labels[3] = (labels[3] + 1) % CLASSES  # misclassified from the start
    outcome = autoattack(victim, clean, labels, Ball(norm, eps), budget=Budget(steps=30, targets=4, queries=50))
    expected = (nearest < eps * 0.995) | (torch.arange(16) == 3)
    close = (nearest / eps - 1).abs() < 0.005
    broken = outcome.broken_by >= 0
    assert (broken == expected)[~close].all()
    assert outcome.broken_by[3] == 0
    assert outcome.names[0] == "clean"
    assert ((victim.ask(outcome.images).argmax(1) != labels) == broken).all()
    assert (length(outcome.images - clean, norm) <= eps * (1 + 1e-5)).all()


def test_averaging_over_starts_sees_through_a_masked_gradient() -> None:
    model = Masked().eval()
    clean = 0.5 - 0.02 * model.w.sign().view(1, 3, SIDE, SIDE).repeat(8, 1, 1, 1)
    clean += 0.002 * torch.randn(8, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    labels = torch.zeros(8, dtype=torch.long)
    ball = Ball("linf", 0.03)

    def mean_score(images: Tensor) -> Tensor:
        """<w, x>: the score that is left when the start is averaged away."""
        return (images.flatten(1) - 0.5) @ model.w

    def attacked(draws: int) -> Tensor:
        victim = Victim(model, **IDENTITY, draws=draws, seed=5)
        loss = losses.toward(torch.ones(8, dtype=torch.long))
        return mean_score(pgd(victim, clean, labels, ball, steps=10, loss=loss))

    optimum = mean_score(clean + ball.eps * model.w.sign().view(1, 3, SIDE, SIDE))
    one, many = attacked(1), attacked(100)
    assert (many > one).all()
    assert ((optimum - many) < 0.5 * (optimum - one)).all()


def test_autoattack_goes_on_until_every_start_is_fooled() -> None:
    """Half of the starts misclassify the clean images: left alone as broken, they would score as half robust."""

    class Shifted(Masked):
        def forward(self, images: Tensor, start: Tensor | None = None) -> Tensor:
            score = (images.flatten(1) - 0.5) @ self.w + (0 if start is None else start.flatten(1)[:, 0])
            return torch.stack([torch.zeros_like(score), score], 1)

    model, clean = Shifted().eval(), torch.full((6, 3, SIDE, SIDE), 0.5)
    labels = torch.zeros(6, dtype=torch.long)
    ball = Ball("linf", 6 / float(model.w.abs().sum()))  # moves the score by six deviations of the start
    victim = Victim(model, **IDENTITY, draws=20, seed=1)
    outcome = autoattack(victim, clean, labels, ball, budget=Budget(steps=5))
    assert victim.with_draws(200, seed=2).score(outcome.images, labels, losses.margin).fooled.min() > 0.99
    assert (outcome.broken_by >= 0).all()


def test_fixed_start_is_deterministic_and_draws_are_seeded() -> None:
    model, images = Masked().eval(), torch.rand(3, 3, SIDE, SIDE)
    fixed = Victim(model, **IDENTITY)
    assert torch.equal(fixed.ask(images), fixed.ask(images))
    first, second = (Victim(model, **IDENTITY, draws=4, seed=1).probabilities(images) for _ in range(2))
    assert first.shape == (4, 3, 2)
    assert torch.equal(first, second)
    assert fixed.with_draws(3, seed=0).draws == 3
    assert Victim(Linear().eval(), **IDENTITY).with_draws(3, seed=0).draws == 0


def test_gradient_is_that_of_the_mean_loss_over_draws() -> None:
    model, images = Masked().eval(), torch.rand(3, 3, SIDE, SIDE)
    labels = torch.tensor([0, 1, 0])
    victim = Victim(model, **IDENTITY, draws=6, seed=1)
    answer = victim.differentiate(images, labels, losses.cross_entropy)
    same = Victim(model, **IDENTITY, draws=6, seed=1)
    leaf = images.clone().requires_grad_()
    values = torch.stack([losses.cross_entropy(same.ask(leaf), labels) for _ in range(6)]).mean(0)
    expected = torch.autograd.grad(values.sum(), leaf)[0]
    torch.testing.assert_close(answer.loss, values.detach())
    torch.testing.assert_close(answer.gradient, expected)
    assert victim.queries == 18


def test_losses_by_hand() -> None:
    logits, labels = torch.tensor([[3.0, 1.0, 0.0, -1.0], [0.0, 2.0, 1.0, -2.0]]), torch.tensor([0, 2])
    assert losses.margin(logits, labels).tolist() == [-2.0, 1.0]
    torch.testing.assert_close(losses.dlr(logits, labels), torch.tensor([-2 / 3, 1 / 2]))
    torch.testing.assert_close(
        losses.targeted_dlr(torch.tensor([2, 0]))(logits, labels), torch.tensor([-3 / 3.5, -1 / 3.0])
    )
