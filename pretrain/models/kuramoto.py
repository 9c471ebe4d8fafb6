"""The K-layer: T steps of the Kuramoto equation on vectors, and the readout.

"Artificial Kuramoto Oscillatory Neurons" (Miyato, Loewe, Geiger, Welling, arXiv 2410.13821):

    dx_i = Omega_i x_i + Proj_{x_i}(c_i + sum_j J_ij x_j),   Proj_x(y) = y - <y, x> x
    x_i <- (x_i + gamma dx_i) / |x_i + gamma dx_i|

Legend: B images, N tokens, n components of an oscillator, K oscillators per token, C = n*K channels.
State [B, N, C] in fp32; the components are planes: channel order (n, K): sums over n run over contiguous vectors.

Deviations from the published code, all equal up to float rounding: the layout; x * rsqrt(sum x^2) for the norm.
`self_drift=True` reproduces its quirk: without Omega it adds x itself, which after normalisation is a step of
gamma / (1 + gamma). Ours is the plain equation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from pretrain.models.connectivity import Coupling, Grid
from pretrain.models.kernels import native, readout

NORMS = ("sphere", "clamp", "rms", "none")
TINY = 1e-24  # square of the smallest norm that still divides


def squared_norm(x: Tensor, n: int) -> Tensor:
    """Squared norm of each oscillator: [..., n*K] -> [..., 1, K]."""
    return x.unflatten(-1, (n, -1)).square().sum(-2, keepdim=True)


def normalise(x: Tensor, n: int) -> Tensor:
    """Every oscillator to norm 1; a zero vector stays zero. [..., C] -> [..., C]."""
    planes = x.unflatten(-1, (n, -1))
    return (planes * squared_norm(x, n).clamp_min(TINY).rsqrt()).flatten(-2)


def clamp_norm(x: Tensor, n: int) -> Tensor:
    """Norms above 1 become 1, smaller ones stay. [..., C] -> [..., C]."""
    planes = x.unflatten(-1, (n, -1))
    return (planes * squared_norm(x, n).clamp_min(1.0).rsqrt()).flatten(-2)


def project(y: Tensor, x: Tensor, n: int) -> Tensor:
    """Proj_x(y) = y - <y, x> x, per oscillator: the part of y tangent to the sphere at the unit vector x."""
    xs, ys = x.unflatten(-1, (n, -1)), y.unflatten(-1, (n, -1))
    return (ys - (xs * ys).sum(-2, keepdim=True) * xs).flatten(-2)


def rotate(x: Tensor, frequency: Tensor, n: int) -> Tensor:
    """Omega x: components (2p, 2p+1) of an oscillator become (w x_1, -w x_0). frequency: [n/2, K] or a scalar."""
    x0, x1 = x.unflatten(-1, (n // 2, 2, -1)).unbind(-2)  # [..., n/2, K]
    return torch.stack([frequency * x1, -frequency * x0], dim=-2).flatten(-3)


@dataclass(frozen=True)
class StepRule:
    """What a step does beside the coupling. `n` components; see KuramotoLayer for the flags."""

    n: int
    projection: bool = True
    self_drift: bool = False
    norm: str = "sphere"


def kuramoto_step(
    x: Tensor, y: Tensor, gamma: float | Tensor, frequency: Tensor | None, gain: Tensor | None, rule: StepRule
) -> Tensor:
    """One step, given y = c + sum_j J_ij x_j. x, y [B, N, C]; returns x [B, N, C].

    `gain` [C] scales the components after norm="rms" and is None otherwise.
    """
    n = rule.n
    direction = x / math.sqrt(n) if rule.norm == "rms" else x  # of norm 1, up to the gain
    drift = project(y, direction, n) if rule.projection else y
    if frequency is not None:
        drift = rotate(x, frequency, n) + drift
    elif rule.self_drift:
        drift = x + drift
    x = x + gamma * drift
    if rule.norm == "sphere":
        return normalise(x, n)
    if rule.norm == "clamp":
        return clamp_norm(x, n)
    if rule.norm == "rms":
        x = normalise(x, n) * math.sqrt(n)
        return x if gain is None else x * gain
    return x


def coupled_step(
    x: Tensor, c: Tensor, coupling: Coupling, grid: Grid, positions: Any, gamma: float | Tensor,
    frequency: Tensor | None, gain: Tensor | None, rule: StepRule,
) -> Tensor:  # fmt: skip
    """One step under the stimulus c [B, N, C]: the coupling, then `kuramoto_step`."""
    return kuramoto_step(x, c + coupling(x, grid, positions), gamma, frequency, gain, rule)


def coupled_steps(
    x: Tensor, c: Tensor, coupling: Coupling, grid: Grid, positions: Any, gamma: float | Tensor,
    frequency: Tensor | None, gain: Tensor | None, rule: StepRule, num_steps: int,
) -> Tensor:  # fmt: skip
    """All steps of a layer."""
    for _ in range(num_steps):
        x = coupled_step(x, c, coupling, grid, positions, gamma, frequency, gain, rule)
    return x


@functools.cache
def _compiled_step() -> Callable[..., Tensor]:
    """One graph for all layers and steps of the same shapes."""
    allow_variants()
    return torch.compile(coupled_step, dynamic=False)


@functools.cache
def _compiled_steps(kernel: str) -> Callable[..., Tensor]:
    """One graph for all layers of the same shapes; `graphed` launches it as one CUDA graph."""
    allow_variants()
    return torch.compile(coupled_steps, dynamic=False, mode="reduce-overhead" if kernel == "graphed" else None)


def allow_variants() -> None:
    """Let torch compile for every variant: stages, blocks that differ in a number (the rate of stochastic depth), sizes
    of chunks, with and without gradients are more than its 8, beyond which code would run as it is."""
    torch._dynamo.config.recompile_limit = max(256, torch._dynamo.config.recompile_limit)


def energy(x: Tensor, y: Tensor) -> Tensor:
    """The published energy -sum_i <x_i, c_i + sum_j J_ij x_j>, per image: [B]. No Lyapunov function: see `lyapunov`."""
    return -(x * y).sum((1, 2))


def lyapunov(x: Tensor, c: Tensor, y: Tensor) -> Tensor:
    """-x'Jx/2 - c'x per image: [B]. Falls along the flow for constant symmetric J without Omega; y = c + Jx."""
    return -(x * (y + c)).sum((1, 2)) / 2


class Omega(nn.Module):
    """Natural frequencies: the norm of a learned 2-vector, one per pair of channels or one for all.

    Args:
        dim: channels C.
        n: components of an oscillator, even.
        shared: one frequency for the whole layer.
        init: initial frequency, in radians per unit of gamma.
        learned: False freezes it.
    """

    def __init__(self, dim: int, n: int, *, shared: bool, init: float, learned: bool) -> None:
        super().__init__()
        if n % 2:
            raise ValueError(f"Omega turns pairs of components: n = {n} must be even")
        self.init = init
        shape = (2,) if shared else (2, n // 2, dim // n)
        self.vector = nn.Parameter(torch.empty(shape), requires_grad=learned)

    def init_weights(self) -> None:
        nn.init.constant_(self.vector, self.init / math.sqrt(2))

    def forward(self) -> Tensor:
        """Frequencies: [n/2, K], or a scalar when shared."""
        return torch.linalg.vector_norm(self.vector, dim=0)


def make_omega(kind: str, dim: int, n: int, *, init: float, learned: bool = True) -> Omega | None:
    """The frequencies named `kind`: "pair", "global" or "none"."""
    if kind not in ("none", "pair", "global"):
        raise ValueError(f"omega {kind!r} is unknown: one of none, pair, global")
    return None if kind == "none" else Omega(dim, n, shared=kind == "global", init=init, learned=learned)


class ScaleBias(nn.Module):
    """`sandb`: scale and bias per channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))

    def init_weights(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, c: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        return torch.addcmul(self.bias, c, self.weight)


class GroupStimulusNorm(ScaleBias):
    """`gn`: GroupNorm of the stimulus with one group per oscillator (its n channels at all tokens), in this layout."""

    def __init__(self, dim: int, n: int, eps: float = 1e-5) -> None:
        super().__init__(dim)
        self.n, self.eps = n, eps

    def forward(self, c: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        out: Tensor = _GroupNorm.apply(c, self.weight, self.bias, self.n, self.eps)
        return out


class _GroupNorm(torch.autograd.Function):
    """`GroupStimulusNorm` and its adjoint: autograd's own goes over c three times as often."""

    @staticmethod
    def forward(ctx: Any, c: Tensor, weight: Tensor, bias: Tensor, n: int, eps: float) -> Tensor:
        centred = c - _group_mean(c.mean(1), n).unsqueeze(1)
        scale = torch.rsqrt(_group_mean(centred.square().mean(1), n) + eps)
        ctx.n = n
        ctx.save_for_backward(centred, scale, weight)
        return torch.addcmul(bias, centred, (scale * weight).unsqueeze(1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        centred, scale, weight = ctx.saved_tensors
        tokens = grad.shape[1]
        d_bias, d_weight = grad.sum(1), (grad * centred).sum(1) * scale  # of each image
        shift = _group_mean(d_bias * weight, ctx.n) * scale / tokens
        along = _group_mean(d_weight * weight, ctx.n) * scale.square() / tokens
        d_c = torch.addcmul(-shift.unsqueeze(1), centred, -along.unsqueeze(1))
        d_c.addcmul_(grad, (scale * weight).unsqueeze(1))
        return d_c, d_weight.sum(0), d_bias.sum(0), None, None


def _group_mean(rows: Tensor, n: int) -> Tensor:
    """The mean over the n components of each oscillator, for each of them: [B, C] -> [B, C]."""
    return rows.unflatten(1, (n, -1)).mean(1).repeat(1, n)


def make_stimulus_norm(kind: str, dim: int, n: int) -> nn.Module:
    """The normalisation of c named `kind`: "gn", "sandb" or "none"."""
    if kind == "gn":
        return GroupStimulusNorm(dim, n)
    if kind == "sandb":
        return ScaleBias(dim)
    if kind == "none":
        return nn.Identity()
    raise ValueError(f"c_norm {kind!r} is unknown: gn, sandb or none")


Observer = Callable[[int, Tensor, Tensor, Tensor], None]


class KuramotoLayer(nn.Module):
    """T steps of the Kuramoto equation under one stimulus.

    Args:
        dim: channels C = n*K.
        n: components of an oscillator.
        coupling: connectivity, see connectivity.py.
        num_steps: T; may be changed at any time.
        gamma: step size. With `learn_gamma` it is handed to `forward`, shared by the layers of a network.
        c_norm: "gn", "sandb" or "none".
        omega: a module giving frequencies, or None.
        projection: False drops Proj (a control).
        norm: "sphere"; as controls "clamp" (norms at most 1), "rms" (norm sqrt(n) and a learned gain) or "none".
        self_drift: the published quirk, see the head of this file.
    """

    def __init__(
        self, dim: int, n: int, coupling: Coupling, *, num_steps: int = 8, gamma: float = 0.5, c_norm: str = "gn",
        omega: Omega | None = None, projection: bool = True, norm: str = "sphere", self_drift: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if dim % n:
            raise ValueError(f"embed_dim {dim} is no multiple of n = {n}")
        if norm not in NORMS:
            raise ValueError(f"norm {norm!r} is unknown: one of {', '.join(NORMS)}")
        self.dim, self.n, self.num_steps, self.gamma = dim, n, num_steps, gamma
        self.rule = StepRule(n=n, projection=projection, self_drift=self_drift, norm=norm)
        self.coupling = coupling
        self.c_norm = make_stimulus_norm(c_norm, dim, n)
        self.omega = omega
        self.gain = nn.Parameter(torch.empty(dim)) if norm == "rms" else None
        self.grad_checkpointing = False
        self.kernel = "plain"

    def init_weights(self) -> None:
        if self.gain is not None:
            nn.init.ones_(self.gain)

    def forward(
        self, x: Tensor, c: Tensor, grid: Grid, *, num_steps: int | None = None, gamma: float | Tensor | None = None,
        observe: Observer | None = None,
    ) -> Tensor:  # fmt: skip
        """Oscillators x and stimulus c [B, N, C] -> oscillators [B, N, C] after T steps.

        x need not be normalised. `observe(t, x_before, c_normalised, y)` is called at every step before the update,
        which keeps what it is given alive: leave it out in training.
        """
        gamma = self.gamma if gamma is None else gamma
        steps = self.num_steps if num_steps is None else num_steps
        c = self.c_norm(c.float())
        x = normalise(x.float(), self.n)
        frequency = None if self.omega is None else self.omega()
        if observe is None and self.kernel == "native" and native.supports(self, x):
            return native.run(self, x, c, grid, steps, gamma, frequency)
        positions = self.coupling.positions(grid)
        recompute = self.grad_checkpointing and torch.is_grad_enabled() and observe is None
        compiled = observe is None and self.kernel in ("compiled", "graphed")
        # On CPUs all steps as one take much longer to compile and are no faster.
        if compiled and x.is_cuda and not recompute and steps == self.num_steps:
            # Where no backward follows, a second graph would write over what the first returned.
            learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, c, *self.parameters()))
            whole = _compiled_steps(self.kernel if learns else "compiled")
            c = c.contiguous()  # the first layer's comes in another layout: it would be compiled for twice
            return whole(x, c, self.coupling, grid, positions, gamma, frequency, self.gain, self.rule, steps)
        fused = _compiled_step() if compiled else coupled_step

        def step(x: Tensor, t: int) -> Tensor:
            if observe is None:
                return fused(x, c, self.coupling, grid, positions, gamma, frequency, self.gain, self.rule)
            y = c + self.coupling(x, grid, positions)
            observe(t, x, c, y)
            return kuramoto_step(x, y, gamma, frequency, self.gain, self.rule)

        for t in range(steps):
            x = checkpoint(step, x, t, use_reentrant=False) if recompute else step(x, t)
        return x


class Readout(nn.Module):
    """c = |U x + b|_n + bias: a linear map to C*n channels, the norm over each n, a bias. [B, N, C] -> [B, N, C].

    Channel order of the linear map: (n, C), the components as planes.
    """

    def __init__(self, dim: int, n: int, out_dim: int | None = None) -> None:
        super().__init__()
        self.n, self.out_dim = n, dim if out_dim is None else out_dim
        self.linear = nn.Linear(dim, n * self.out_dim)
        self.bias = nn.Parameter(torch.empty(self.out_dim))
        self.kernel = "plain"
        self.grad_checkpointing = False

    def init_weights(self) -> None:
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel == "native" and readout.supports(self, x):
            return readout.run(self, x)
        y = self.linear(x.to(self.linear.weight.dtype)).float()
        return squared_norm(y, self.n).clamp_min(TINY).sqrt().squeeze(-2) + self.bias
