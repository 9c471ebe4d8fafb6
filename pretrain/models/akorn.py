"""AKOrN backbones in timm's form.

"Artificial Kuramoto Oscillatory Neurons" (arXiv 2410.13821): patches give the stimulus c; L blocks of a K-layer (T
steps of the Kuramoto equation, kuramoto.py) and a readout that becomes the next stimulus; the oscillators x pass on.

Legend: B images, N = h*w tokens, n components, K oscillators per token, C = n*K channels in the order (n, K).

Starts. x is N(0, 1) before it is normalised: drawn afresh at every forward in training, one draw of shape [1, N, C] by
`start_seed` in evaluation, so that the features of an image do not depend on its batch. Either may be given.

Deviations from the published code: the plain equation (kuramoto.py), hence gamma 0.5 where its flag says 1; a linear
classifier instead of the MLP, which is SimCLR's projector; max pooling as a reduction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.models.backbone import Backbone, Size, map_of
from pretrain.models.connectivity import Grid, make_coupling
from pretrain.models.kuramoto import KuramotoLayer, Observer, Omega, Readout, energy, lyapunov
from pretrain.models.positions import resample_tokens, sine_cosine


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


def per_layer(value: Any, depth: int, name: str) -> list[Any]:
    """One value for all layers, or one for each."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * depth
    if len(value) != depth:
        raise ValueError(f"{name} has {len(value)} values for {depth} layers: give one for all, or one per layer")
    return list(value)


@dataclass
class OscillatorOutput:
    """What one forward of an AKOrN went through; lists have one entry per layer.

    Attributes:
        readout: [B, C, h, w].
        oscillators: final x, tokens [B, N, C] in (n, K) order; `oscillators_of` gives the published form.
        energy: published energy before each update, float32 [T+1, B], entry 0 zero; empty unless asked for.
        lyapunov: the same with the factor 1/2 on the coupling.
        trajectory: x at the start and after each step [T+1, B, N, C]; empty unless asked for.
        grid: tokens (rows, columns).
    """

    grid: Grid
    readout: list[Tensor] = field(default_factory=list)
    oscillators: list[Tensor] = field(default_factory=list)
    energy: list[Tensor] = field(default_factory=list)
    lyapunov: list[Tensor] = field(default_factory=list)
    trajectory: list[Tensor] = field(default_factory=list)


class StepRecorder:
    """Collects energies and states of one layer's steps."""

    def __init__(self, *, trajectory: bool) -> None:
        self.states: list[Tensor] | None = [] if trajectory else None
        self.energies: list[Tensor] = []
        self.lyapunovs: list[Tensor] = []

    def __call__(self, t: int, x: Tensor, c: Tensor, y: Tensor) -> None:
        self.energies.append(energy(x, y))
        self.lyapunovs.append(lyapunov(x, c, y))
        if self.states is not None:
            self.states.append(x)

    def write(self, output: OscillatorOutput, x: Tensor, *, energies: bool) -> None:
        """Append this layer to the output; x is the state after the last step."""
        if energies:
            zero = x.new_zeros(x.shape[0], dtype=torch.float32)
            output.energy.append(torch.stack([zero, *self.energies]))
            output.lyapunov.append(torch.stack([zero, *self.lyapunovs]))
        if self.states is not None:
            output.trajectory.append(torch.stack([*self.states, x]))


class KuramotoBlock(nn.Module):
    """K-layer, readout, and what x becomes on its way to the next block."""

    def __init__(self, kuramoto: KuramotoLayer, readout: Readout, carry: nn.Module) -> None:
        super().__init__()
        self.kuramoto = kuramoto
        self.readout: nn.Module = readout
        self.carry = carry  # Identity, or a linear map (published: use_ro_x)

    def drop_output(self) -> None:
        """Keep the oscillators only (features of this level need no readout)."""
        self.readout, self.carry = nn.Identity(), nn.Identity()


class Blocks(nn.ModuleList):
    """The blocks of one network, typed."""

    def __iter__(self) -> Iterator[KuramotoBlock]:  # type: ignore[override]
        return super().__iter__()


class AKOrN(Backbone):
    """AKOrN for images. Arguments of `Backbone`, and:

    Args:
        depth: blocks L.
        num_heads: attention heads.
        n: components of an oscillator.
        num_steps: T, one for all blocks or one each.
        gamma: step size of the plain equation; `learn_gamma` learns one for all blocks.
        coupling: "attn", "conv", or "none" (J = 0, a control); one for all blocks or one each.
        kernel_size: of convolutional couplings; one for all blocks or one each.
        positions: "gta", "abs" (sine/cosine added to c and x, learned from there) or "none".
        c_norm: "gn", "sandb" or "none".
        omega: "none", "pair" (a frequency per pair of channels) or "global" (one per block).
        omega_init: initial frequency; `learn_omega=False` freezes it.
        projection: False drops Proj (a control).
        norm: "sphere"; as controls "clamp", "rms" or "none".
        carry: "identity" or "linear": how x passes on to the next block.
        self_drift: the published quirk without Omega (kuramoto.py).
        start_seed: seed of the start in evaluation.
    """

    level_parts = (".kuramoto", ".readout")
    start: Tensor
    blocks: Blocks

    def __init__(
        self,
        img_size: Size = 256,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "max",
        embed_dim: int = 384,
        depth: int = 2,
        num_heads: int = 8,
        n: int = 4,
        num_steps: int | Sequence[int] = 8,
        gamma: float = 0.5,
        learn_gamma: bool = False,
        coupling: str | Sequence[str] = "attn",
        kernel_size: int | Sequence[int] = 3,
        positions: str = "gta",
        c_norm: str = "gn",
        omega: str = "none",
        omega_init: float = 1.0,
        learn_omega: bool = True,
        projection: bool = True,
        norm: str = "sphere",
        carry: str = "identity",
        self_drift: bool = False,
        drop_rate: float = 0.0,
        rescale_input: bool = False,
        start_seed: int = 0,
    ) -> None:
        super().__init__(
            img_size=img_size, patch_size=patch_size, in_chans=in_chans, num_classes=num_classes,
            global_pool=global_pool, embed_dim=embed_dim, drop_rate=drop_rate, rescale_input=rescale_input,
        )  # fmt: skip
        for name, value, known in (
            ("positions", positions, ("gta", "abs", "none")),
            ("omega", omega, ("none", "pair", "global")),
            ("carry", carry, ("identity", "linear")),
        ):
            if value not in known:
                raise ValueError(f"{name} {value!r} is unknown: one of {', '.join(known)}")
        self.n, self.start_seed = n, start_seed
        self.gamma = nn.Parameter(torch.empty(1)) if learn_gamma else None
        self.gamma_init = gamma
        num_tokens = self.grid[0] * self.grid[1]
        self.pos_c = nn.Parameter(torch.empty(num_tokens, embed_dim)) if positions == "abs" else None
        self.pos_x = nn.Parameter(torch.empty(num_tokens, embed_dim)) if positions == "abs" else None

        def make_block(i: int, kind: str, size: int, steps: int) -> KuramotoBlock:
            grid = self.grid if positions == "gta" else None
            layer = KuramotoLayer(
                embed_dim, n, make_coupling(kind, embed_dim, num_heads=num_heads, grid=grid, kernel_size=size),
                num_steps=steps, gamma=gamma, c_norm=c_norm, projection=projection, norm=norm, self_drift=self_drift,
                omega=None if omega == "none" else Omega(
                    embed_dim, n, shared=omega == "global", init=omega_init, learned=learn_omega),
            )  # fmt: skip
            linear = carry == "linear" and i < depth - 1
            return KuramotoBlock(
                layer, Readout(embed_dim, n), nn.Linear(embed_dim, embed_dim) if linear else nn.Identity()
            )

        kinds, sizes = per_layer(coupling, depth, "coupling"), per_layer(kernel_size, depth, "kernel_size")
        steps = per_layer(num_steps, depth, "num_steps")
        self.blocks = Blocks(map(make_block, range(depth), kinds, sizes, steps))
        self.norm = nn.Identity()
        self.register_buffer("start", self.draw_start(), persistent=False)
        self._finish(depth)

    def init_weights(self) -> None:
        """The model's own parameters; modules initialise theirs."""
        if self.gamma is not None:
            nn.init.constant_(self.gamma, self.gamma_init)
        for table in (self.pos_c, self.pos_x):
            if table is not None:
                table.copy_(sine_cosine(self.grid, self.embed_dim))

    def start_shape(self, img_size: Size | None = None) -> tuple[int, int]:
        """Shape (N, C) of the initial oscillators of an image of this size (default: the model's own)."""
        if img_size is None or self.rescale_input:
            rows, columns = self.grid
        else:
            height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
            rows, columns = self.patch_embed.dynamic_feat_size((height, width))
        return rows * columns, self.embed_dim

    def draw_start(self, seed: int | None = None, img_size: Size | None = None) -> Tensor:
        """The start that evaluation uses for a seed (default: `start_seed`): float32 [1, N, C] on the CPU."""
        generator = torch.Generator("cpu").manual_seed(self.start_seed if seed is None else seed)
        return torch.randn(1, *self.start_shape(img_size), generator=generator, device="cpu")

    def set_start_seed(self, seed: int) -> None:
        """Another start in evaluation from now on."""
        self.start_seed = seed
        self.start.copy_(self.draw_start())

    def set_steps(self, num_steps: int | Sequence[int]) -> None:
        """T from now on: one for all blocks or one each."""
        for block, steps in zip(self.blocks, per_layer(num_steps, len(self.blocks), "num_steps"), strict=True):
            block.kuramoto.num_steps = steps

    def _start(self, images: Tensor, grid: Grid, start: Tensor | None) -> Tensor:
        """Initial oscillators before normalisation, float32 [B, N, C]."""
        B, N = images.shape[0], grid[0] * grid[1]
        if start is None and self.training:
            start = torch.randn(B, N, self.embed_dim, device=images.device)
        elif start is None and grid == self.grid:
            start = self.start
        elif start is None:
            start = self.draw_start(img_size=(images.shape[2], images.shape[3])).to(images.device)
        start = state_of(start, self.n).float()
        if start.shape[0] not in (1, B) or tuple(start.shape[1:]) != (N, self.embed_dim):
            raise ValueError(
                f"start {tuple(start.shape)} does not fit {B} images of {N} tokens and {self.embed_dim} channels"
            )
        if self.pos_x is not None:
            start = start + resample_tokens(self.pos_x, self.grid, grid, dim=0)
        return start.expand(B, -1, -1)

    def _stimulus(self, images: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor, Grid]:
        """Images -> c, x before normalisation [B, N, C] each, and the grid."""
        c, grid = self._embed(images)
        if self.pos_c is not None:
            c = c + resample_tokens(self.pos_c, self.grid, grid, dim=0)
        return c, self._start(images, grid, start), grid

    def _levels(self, images: Tensor, start: Tensor | None = None) -> Iterator[tuple[Tensor, Grid]]:
        c, x, grid = self._stimulus(images, start)
        yield c, grid
        for block in self.blocks:
            x = block.kuramoto(x, c, grid, gamma=self.gamma)
            yield x, grid
            c = block.readout(x)
            yield c, grid
            x = block.carry(x)

    def forward_oscillators(
        self, images: Tensor, start: Tensor | None = None, *, steps: int | None = None, trajectory: bool = False,
        energy: bool = False,
    ) -> OscillatorOutput:  # fmt: skip
        """Readouts and oscillators of every layer; energies and trajectories if asked for.

        steps: T of all blocks in this call (default: the model's own).
        """
        c, x, grid = self._stimulus(images, start)
        output = OscillatorOutput(grid)
        for block in self.blocks:
            recorder = StepRecorder(trajectory=trajectory)
            observe: Observer | None = recorder if trajectory or energy else None
            x = block.kuramoto(x, c, grid, num_steps=steps, gamma=self.gamma, observe=observe)
            if observe is not None:
                recorder.write(output, x, energies=energy)
            c = block.readout(x)
            output.oscillators.append(x)
            output.readout.append(map_of(c, grid))
            x = block.carry(x)
        return output

    def _regrid(self, old: Grid) -> None:
        for block in self.blocks:
            block.kuramoto.coupling.set_grid(self.grid)
        for name in ("pos_c", "pos_x"):
            table = getattr(self, name)
            if table is not None:
                with torch.no_grad():
                    resampled = resample_tokens(table, old, self.grid, dim=0).contiguous()
                setattr(self, name, nn.Parameter(resampled, requires_grad=table.requires_grad))
        self.start = self.draw_start().to(self.start)
