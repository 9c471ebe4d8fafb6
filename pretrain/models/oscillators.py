"""Where oscillators start, and what can be recorded of their way.

Starts are N(0, 1) before they are normalised: drawn afresh at every forward in training, one draw of shape [1, N, C]
by a seed in evaluation, so that the features of an image do not depend on its batch. Either may be given instead.

Legend: B images, N tokens, n components, K oscillators per token, C = n*K channels in the order (n, K), T steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from timm.models._input import update_model_args
from torch import Tensor, nn

from pretrain.models.connectivity import Grid
from pretrain.models.kuramoto import KuramotoLayer, energy, lyapunov


def state_of(start: Tensor, n: int) -> Tensor:
    """A start in either form, published [B, K, n, h, w] or tokens [B, N, C], as tokens [B, N, C] in (n, K) order."""
    if start.ndim != 5:
        return start
    if start.shape[2] != n:
        raise ValueError(f"start {tuple(start.shape)} does not fit [B, K, n, h, w] with n = {n}")
    return start.permute(0, 3, 4, 2, 1).flatten(3).flatten(1, 2)


def oscillators_of(tokens: Tensor, n: int, grid: Grid) -> Tensor:
    """Tokens [B, N, C] in (n, K) order as published oscillators [B, K, n, h, w]."""
    return tokens.unflatten(-1, (n, -1)).unflatten(1, grid).permute(0, 4, 3, 1, 2)


class Starts(nn.Module):
    """A network whose oscillators need a start. Subclasses call `_init_start` and define `start_shape`."""

    n: int
    start_seed: int
    start: Tensor

    def _init_start(self, n: int, start_seed: int) -> None:
        self.n, self.start_seed = n, start_seed
        self.register_buffer("start", self.draw_start(), persistent=False)

    def start_shape(self, img_size: int | tuple[int, int] | list[int] | None = None) -> tuple[int, int]:
        """Shape (N, C) of the initial oscillators of an image of this size (default: the model's own)."""
        raise NotImplementedError

    def draw_start(self, seed: int | None = None, img_size: int | tuple[int, int] | list[int] | None = None) -> Tensor:
        """The start that evaluation uses for a seed (default: `start_seed`): float32 [1, N, C] on the CPU."""
        generator = torch.Generator("cpu").manual_seed(self.start_seed if seed is None else seed)
        return torch.randn(1, *self.start_shape(img_size), generator=generator, device="cpu")

    def set_start_seed(self, seed: int) -> None:
        """Another start in evaluation from now on."""
        self.start_seed = seed
        update_model_args(self, start_seed=seed)
        self._redraw_start()

    def init_non_persistent_buffers(self) -> None:
        """Draw the start of a model that was made empty: it is in no state dict (a convention of timm's)."""
        self._redraw_start()

    def _redraw_start(self) -> None:
        self.start = self.draw_start().to(self.start)

    def _start(self, inputs: Tensor, num_tokens: int, start: Tensor | None) -> Tensor:
        """Initial oscillators before normalisation, float32 [B or 1, N, C], for inputs of B images."""
        _, N, C = self.start.shape
        B = inputs.shape[0]
        if start is None and self.training:
            return torch.randn(B, num_tokens, C, device=inputs.device)
        if start is None and num_tokens == N:
            start = self.start
        elif start is None:
            start = self.draw_start(img_size=(inputs.shape[2], inputs.shape[3])).to(inputs.device)
        start = state_of(start, self.n).float()
        if start.shape[0] not in (1, B) or tuple(start.shape[1:]) != (num_tokens, C):
            raise ValueError(f"start {tuple(start.shape)} does not fit {B} images of {num_tokens} tokens, {C} channels")
        return start


@dataclass
class OscillatorOutput:
    """What one forward of an AKOrN went through; lists have one entry per layer.

    Attributes:
        grids: tokens (rows, columns).
        readout: [B, C, h, w].
        oscillators: final x, tokens [B, N, C] in (n, K) order; `oscillators_of` gives the published form.
        energy: published energy before each update, float32 [T+1, B], entry 0 zero; empty unless asked for.
        lyapunov: the same with the factor 1/2 on the coupling.
        trajectory: x at the start and after each step [T+1, B, N, C]; empty unless asked for.
    """

    grids: list[Grid] = field(default_factory=list)
    readout: list[Tensor] = field(default_factory=list)
    oscillators: list[Tensor] = field(default_factory=list)
    energy: list[Tensor] = field(default_factory=list)
    lyapunov: list[Tensor] = field(default_factory=list)
    trajectory: list[Tensor] = field(default_factory=list)


@dataclass
class Recorder:
    """Runs K-layers and writes down what was asked for.

    Attributes:
        output: where it goes.
        steps: T of every layer in this run (None: their own).
        energies: record both energies at every step.
        trajectories: record the state at every step.
    """

    output: OscillatorOutput
    steps: int | None = None
    energies: bool = False
    trajectories: bool = False

    def run(self, layer: KuramotoLayer, x: Tensor, c: Tensor, grid: Grid, gamma: Tensor | None) -> Tensor:
        """x, c [B, N, C] -> x after the layer's steps."""
        energies, lyapunovs, states = [], [], []

        def observe(t: int, x: Tensor, c: Tensor, y: Tensor) -> None:
            if self.energies:
                energies.append(energy(x, y))
                lyapunovs.append(lyapunov(x, c, y))
            if self.trajectories:
                states.append(x)

        wanted = observe if self.energies or self.trajectories else None
        x = layer(x, c, grid, num_steps=self.steps, gamma=gamma, observe=wanted)
        if self.energies:
            zero = x.new_zeros(x.shape[0])
            self.output.energy.append(torch.stack([zero, *energies]))
            self.output.lyapunov.append(torch.stack([zero, *lyapunovs]))
        if self.trajectories:
            self.output.trajectory.append(torch.stack([*states, x]))
        self.output.grids.append(grid)
        self.output.oscillators.append(x)
        return x
