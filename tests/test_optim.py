"""Parameter groups by name, LARS against naive loops, and skipping on the device."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from configs.schema import Optimizer
from pretrain.models.sudoku import SudokuNet
from pretrain.optim import Lars, make_optimizer, no_decay_names, parameter_groups


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gta = nn.Parameter(torch.randn(2, 2, 3))
        self.proj = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)

    def no_weight_decay(self) -> set[str]:
        return {"gta"}


def test_decay_falls_on_matrices_that_no_model_exempts() -> None:
    module = nn.ModuleDict({"a": Listed(), "head": nn.Linear(3, 2)})
    assert no_decay_names(module) == {"a.gta", "a.proj.bias", "a.norm.weight", "a.norm.bias", "head.bias"}
    decayed, others = parameter_groups(module, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert {id(p) for p in decayed["params"]} == {id(module["a"].proj.weight), id(module["head"].weight)}
    assert others["weight_decay"] == 0.0
    assert len(others["params"]) == 5


def test_positions_of_a_sudoku_solver_do_not_decay() -> None:
    names = no_decay_names(SudokuNet("akorn", embed_dim=8, num_heads=2))
    assert {f"blocks.0.kuramoto.coupling.{table}" for table in ("gta_in", "gta_out")} <= names


def test_frozen_parameters_are_in_no_group() -> None:
    module = nn.Linear(3, 3)
    module.bias.requires_grad_(False)
    (group,) = parameter_groups(module, 0.1)
    assert [id(p) for p in group["params"]] == [id(module.weight)]


def naive_lars(w: list[float], gradients: list[list[float]], decay: float, adapt: bool) -> list[float]:
    v = [0.0] * len(w)
    for g in gradients:
        g = [gi + decay * wi for gi, wi in zip(g, w)]
        norm = lambda x: math.sqrt(sum(xi * xi for xi in x))  # noqa: E731
        scale = 0.02 * norm(w) / norm(g) if adapt else 1.0
        v = [0.9 * vi + 0.1 * scale * gi for vi, gi in zip(v, g)]
        w = [wi - vi for wi, vi in zip(w, v)]
    return w


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_lars_equals_naive_loops(decay: float) -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(4, dtype=torch.float64))
    start, gradients = p.tolist(), torch.randn(5, 4, dtype=torch.float64)
    optimizer = Lars([{"params": [p], "weight_decay": decay}], lr=0.1, momentum=0.9, trust=0.02)
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
    assert p.tolist() == pytest.approx(naive_lars(start, gradients.tolist(), decay, decay > 0))


@pytest.mark.parametrize("name", ["adamw", "adam", "lars"])
def test_found_inf_leaves_everything_as_it_was(name: str) -> None:
    module = nn.Linear(3, 3)
    optimizer = make_optimizer(module, Optimizer(name=name, weight_decay=0.1))
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()

    def state() -> list[Tensor]:
        moments = [t.clone() for s in optimizer.state.values() for t in s.values()]
        return [p.detach().clone() for p in module.parameters()] + moments

    before = state()
    for p in module.parameters():
        p.grad = torch.full_like(p, torch.nan)
    optimizer.found_inf, optimizer.grad_scale = torch.ones(()), torch.tensor(torch.nan)  # type: ignore[attr-defined]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, state()))


@pytest.mark.parametrize("name", ["adamw", "lars"])
def test_grad_scale_divides_the_gradient(name: str) -> None:
    def trained(gradient: float, scale: float | None) -> Tensor:
        torch.manual_seed(0)
        module = nn.Linear(3, 3)
        optimizer = make_optimizer(module, Optimizer(name=name, lr=0.1, eps=0.5))
        if scale is not None:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.zeros(())  # type: ignore[attr-defined]
        for p in module.parameters():
            p.grad = torch.full_like(p, gradient)
        optimizer.step()
        return module.weight.detach()

    torch.testing.assert_close(trained(8.0, 4.0), trained(2.0, None))
