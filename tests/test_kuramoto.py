"""The mathematics of the K-layer: norms, tangency, energies, rotations; the step against a loop over oscillators."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from pretrain.models.connectivity import Coupling, Grid, Positions
from pretrain.models.kuramoto import (
    GroupStimulusNorm,
    KuramotoLayer,
    Omega,
    Readout,
    StepRule,
    clamp_norm,
    energy,
    kuramoto_step,
    lyapunov,
    normalise,
    project,
    rotate,
)

GRID = (2, 3)


class Constant(Coupling):
    """A fixed matrix over all positions and channels of a token grid: J x, float64 as the test needs it."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, x: Tensor, grid: Grid, positions: Positions) -> Tensor:
        return (x.flatten(1) @ self.matrix.t()).view_as(x)


def norms(x: Tensor, n: int) -> Tensor:
    return x.unflatten(-1, (n, -1)).norm(dim=-2)


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_step_equals_a_loop_over_oscillators(n: int) -> None:
    torch.manual_seed(0)
    B, N, K, gamma = 2, 3, 5, 0.7
    x, y = normalise(torch.randn(B, N, n * K), n), torch.randn(B, N, n * K)
    frequency = torch.rand(n // 2, K) if n % 2 == 0 else None
    stepped = kuramoto_step(x, y, gamma, frequency, None, StepRule(n))
    for b in range(B):
        for t in range(N):
            for k in range(K):
                xi, yi = x[b, t].view(n, K)[:, k], y[b, t].view(n, K)[:, k]
                drift = yi - torch.dot(xi, yi) * xi
                if frequency is not None:
                    omega = torch.zeros(n, n)
                    for p in range(n // 2):
                        omega[2 * p, 2 * p + 1], omega[2 * p + 1, 2 * p] = frequency[p, k], -frequency[p, k]
                    drift = drift + omega @ xi
                expected = xi + gamma * drift
                got = stepped[b, t].view(n, K)[:, k]
                torch.testing.assert_close(got, expected / expected.norm(), rtol=1e-5, atol=1e-6)


def test_update_is_tangent_and_norms_stay_one() -> None:
    torch.manual_seed(0)
    n = 4
    x, y = normalise(torch.randn(2, 6, 32), n), 10 * torch.randn(2, 6, 32)
    inner = (x * project(y, x, n)).unflatten(-1, (n, -1)).sum(-2)
    assert inner.abs().max() < 1e-5
    layer = KuramotoLayer(32, n, Coupling(), num_steps=20, gamma=1.0, c_norm="none")
    torch.testing.assert_close(norms(layer(x, y, GRID), n), torch.ones(2, 6, 8))


def test_zero_vectors_give_no_nan() -> None:
    x = torch.zeros(1, 6, 8, requires_grad=True)
    for function in (normalise, clamp_norm):
        function(x, 4).sum().backward()
    readout = Readout(8, 4)
    nn.init.zeros_(readout.linear.weight)
    nn.init.zeros_(readout.linear.bias)
    readout.init_weights()
    readout(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("gamma", [0.01, 0.1])
def test_energy_with_one_half_falls_for_symmetric_constant_coupling(gamma: float) -> None:
    """-x'Jx/2 - c'x never rises without Omega; the published energy, without the 1/2, does for some systems."""
    torch.manual_seed(1)
    n, K, tokens = 4, 3, GRID[0] * GRID[1]
    dim = n * K
    published_rises = 0
    for _ in range(20):
        matrix = torch.randn(tokens * dim, tokens * dim) / math.sqrt(tokens * dim)
        layer = KuramotoLayer(dim, n, Constant((matrix + matrix.t()) / 2), num_steps=60, gamma=gamma, c_norm="none")
        c, seen = torch.randn(4, tokens, dim), []

        def observe(t: int, x: Tensor, c: Tensor, y: Tensor, seen: list = seen) -> None:
            seen.append((energy(x, y), lyapunov(x, c, y)))

        layer(torch.randn(4, tokens, dim), c, GRID, observe=observe)
        published, halved = (torch.stack(values) for values in zip(*seen, strict=True))
        assert (halved.diff(dim=0) <= 1e-4).all()
        assert (halved[-1] < halved[0]).all()
        published_rises += bool((published.diff(dim=0) > 1e-4).any())
    assert published_rises > 0 or gamma < 0.1  # 60 small steps do not get far enough to see it


def test_energies_equal_their_definitions() -> None:
    torch.manual_seed(0)
    matrix, dim, tokens = torch.randn(48, 48), 8, 6
    x, c = torch.randn(3, tokens, dim), torch.randn(3, tokens, dim)
    y = c + Constant(matrix)(x, GRID, None)
    for b in range(3):
        v, w = x[b].flatten(), c[b].flatten()
        torch.testing.assert_close(energy(x, y)[b], -(v @ matrix @ v) - w @ v, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(lyapunov(x, c, y)[b], -(v @ matrix @ v) / 2 - w @ v, rtol=1e-4, atol=1e-4)


def test_omega_alone_is_a_pure_rotation() -> None:
    """Without stimulus and coupling, T steps of Omega turn each pair by T * atan(gamma * w)."""
    torch.manual_seed(0)
    n, K, gamma, T = 2, 5, 0.1, 7
    omega = Omega(n * K, n, shared=False, init=1.0, learned=True)
    with torch.no_grad():
        omega.vector.copy_(torch.randn(2, 1, K))
    layer = KuramotoLayer(n * K, n, Coupling(), num_steps=T, gamma=gamma, c_norm="none", omega=omega)
    x = normalise(torch.randn(1, 6, n * K), n)
    turned = layer(x, torch.zeros(1, 6, n * K), GRID)
    angle = T * torch.atan(gamma * omega.vector.norm(dim=0)[0])
    x0, x1 = x.view(1, 6, 2, K).unbind(2)
    expected = torch.cat([x0 * angle.cos() + x1 * angle.sin(), x1 * angle.cos() - x0 * angle.sin()], dim=-1)
    torch.testing.assert_close(turned, expected)
    assert (rotate(x, torch.ones(1, K), n) * x).sum().abs() < 1e-5


def test_published_quirk_is_the_plain_equation_with_half_the_step() -> None:
    torch.manual_seed(0)
    x, c = torch.randn(2, 6, 32), torch.randn(2, 6, 32)
    quirk = KuramotoLayer(32, 4, Coupling(), num_steps=5, gamma=1.0, c_norm="none", self_drift=True)
    plain = KuramotoLayer(32, 4, Coupling(), num_steps=5, gamma=0.5, c_norm="none")
    torch.testing.assert_close(quirk(x, c, GRID), plain(x, c, GRID))


def test_stimulus_norm_is_torchs_group_norm_in_the_other_layout() -> None:
    torch.manual_seed(0)
    n, K = 4, 6
    norm, reference = GroupStimulusNorm(n * K, n), nn.GroupNorm(K, n * K)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(n * K))
        norm.bias.copy_(torch.randn(n * K))
        reference.weight.copy_(norm.weight.view(n, K).t().flatten())
        reference.bias.copy_(norm.bias.view(n, K).t().flatten())
    c = torch.randn(2, 6, n * K, requires_grad=True)
    expected = reference(c.view(2, 6, n, K).permute(0, 3, 2, 1).flatten(1, 2))  # [B, K*n, N]
    expected = expected.view(2, K, n, 6).permute(0, 3, 2, 1).flatten(2)
    out, grad = norm(c), torch.randn(2, 6, n * K)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(out, [c, norm.weight, norm.bias], grad)
    theirs = torch.autograd.grad(expected, [c, reference.weight, reference.bias], grad)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    for mine, torchs in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(mine, torchs.view(K, n).t().flatten(), rtol=1e-5, atol=1e-5)


def test_readout_is_the_norm_of_n_linear_maps() -> None:
    torch.manual_seed(0)
    readout = Readout(8, 4)
    nn.init.normal_(readout.bias)
    x = torch.randn(2, 6, 8)
    maps = readout.linear.weight.view(4, 8, 8) @ x[1, 2] + readout.linear.bias.view(4, 8)
    torch.testing.assert_close(readout(x)[1, 2], maps.norm(dim=0) + readout.bias)


@pytest.mark.parametrize(("norm", "low", "high"), [("clamp", 0.0, 1.0), ("rms", 2.0, 2.0), ("sphere", 1.0, 1.0)])
def test_norm_ablations_hold_their_norms(norm: str, low: float, high: float) -> None:
    torch.manual_seed(0)
    layer = KuramotoLayer(32, 4, Coupling(), num_steps=4, c_norm="none", norm=norm, gamma=0.3)
    layer.init_weights()
    found = norms(layer(torch.randn(2, 6, 32), torch.randn(2, 6, 32), GRID), 4)
    assert found.min() >= low - 1e-5
    assert found.max() <= high + 1e-5


def test_rms_is_the_sphere_of_another_radius() -> None:
    """At norm sqrt(n), a step of sqrt(n) gamma turns an oscillator as a step of gamma does at norm 1."""
    torch.manual_seed(0)
    n, x, y = 4, normalise(torch.randn(2, 6, 32), 4), torch.randn(2, 6, 32)
    radius = math.sqrt(n)
    for _ in range(5):
        wide = kuramoto_step(radius * x, y, radius * 0.5, None, torch.ones(32), StepRule(n, norm="rms"))
        x = kuramoto_step(x, y, 0.5, None, None, StepRule(n))
        torch.testing.assert_close(wide, radius * x)


def test_recomputation_changes_no_gradient() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(192, 192) / 14
    layer = KuramotoLayer(32, 4, Constant(matrix), num_steps=5)
    for module in layer.modules():
        getattr(module, "init_weights", lambda: None)()
    x, c = torch.randn(2, 6, 32), torch.randn(2, 6, 32, requires_grad=True)
    (kept,) = torch.autograd.grad(layer(x, c, GRID).square()[..., :3].sum(), c)
    layer.grad_checkpointing = True
    (recomputed,) = torch.autograd.grad(layer(x, c, GRID).square()[..., :3].sum(), c)
    assert torch.equal(kept, recomputed)


def test_wrong_arguments_name_the_remedy() -> None:
    with pytest.raises(ValueError, match="multiple of n"):
        KuramotoLayer(30, 4, Coupling())
    with pytest.raises(ValueError, match="sphere"):
        KuramotoLayer(32, 4, Coupling(), norm="spher")
    with pytest.raises(ValueError, match="gn, sandb or none"):
        KuramotoLayer(32, 4, Coupling(), c_norm="groupnorm")
    with pytest.raises(ValueError, match="even"):
        Omega(30, 3, shared=False, init=1.0, learned=True)
