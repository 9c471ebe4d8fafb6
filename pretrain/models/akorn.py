"""AKOrN backbones in timm's form.

"Artificial Kuramoto Oscillatory Neurons" (arXiv 2410.13821): patches give the stimulus c; L blocks of a K-layer (T
steps of the Kuramoto equation, kuramoto.py) and a readout that becomes the next stimulus; the oscillators x pass on.

Legend: B images, N = h*w tokens, n components, K oscillators per token, C = n*K channels in the order (n, K).

Deviations from the published code: the plain equation (kuramoto.py), hence gamma 0.5 where its flag says 1; a linear
classifier instead of the MLP, which is SimCLR's projector; max pooling as a reduction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from timm.models._input import update_model_args
from torch import Tensor, nn

from pretrain.models.backbone import PatchBackbone, Size, map_of, per_block, steps_per_block
from pretrain.models.connectivity import Grid, make_coupling
from pretrain.models.kuramoto import KuramotoLayer, Readout, make_omega
from pretrain.models.oscillators import OscillatorOutput, Recorder, Starts
from pretrain.models.positions import resample_tokens, sine_cosine


class Carry(nn.Linear):
    """A linear map of the oscillators between two blocks (published: use_ro_x)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class KuramotoBlock(nn.Module):
    """K-layer, readout, and what x becomes on its way to the next block."""

    def __init__(self, kuramoto: KuramotoLayer, readout: Readout, carry: nn.Module) -> None:
        super().__init__()
        self.kuramoto = kuramoto
        self.readout: nn.Module = readout
        self.carry = carry

    def drop_output(self) -> None:
        """Keep the oscillators only (features of this level need no readout)."""
        self.readout, self.carry = nn.Identity(), nn.Identity()


class Blocks(nn.ModuleList):
    """The blocks of one network, typed."""

    def __iter__(self) -> Iterator[KuramotoBlock]:
        return cast("Iterator[KuramotoBlock]", super().__iter__())


class AKOrN(PatchBackbone, Starts):
    """AKOrN for images. Arguments of `PatchBackbone`, and:

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
        norm: "sphere"; as controls "clamp", "rms" or "none". A step along a tangent never shortens a unit vector, so
            "clamp" differs from "sphere" only with `projection=False`.
        carry: "identity" or "linear": how x passes on to the next block.
        self_drift: the published quirk without Omega (kuramoto.py).
        start_seed: seed of the start in evaluation.
    """

    level_parts = ("kuramoto", "readout")
    blocks: Blocks

    def __init__(
        self, img_size: Size = 256, patch_size: int = 16, in_chans: int = 3, num_classes: int = 1000,
        global_pool: str = "max", embed_dim: int = 384, depth: int = 2, num_heads: int = 8, n: int = 4,
        num_steps: int | Sequence[int] = 8, gamma: float = 0.5, learn_gamma: bool = False,
        coupling: str | Sequence[str] = "attn", kernel_size: int | Sequence[int] = 3, positions: str = "gta",
        c_norm: str = "gn", omega: str = "none", omega_init: float = 1.0, learn_omega: bool = True,
        projection: bool = True, norm: str = "sphere", carry: str = "identity", self_drift: bool = False,
        drop_rate: float = 0.0, rescale_input: bool = False, start_seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(
            img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim,
            rescale_input=rescale_input, num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate,
        )  # fmt: skip
        for name, value, known in (
            ("positions", positions, ("gta", "abs", "none")),
            ("carry", carry, ("identity", "linear")),
        ):
            if value not in known:
                raise ValueError(f"{name} {value!r} is unknown: one of {', '.join(known)}")
        self.gamma = nn.Parameter(torch.empty(1)) if learn_gamma else None
        self.gamma_init = gamma
        tokens = self.grid[0] * self.grid[1], embed_dim
        self.pos_c = nn.Parameter(torch.empty(tokens)) if positions == "abs" else None
        self.pos_x = nn.Parameter(torch.empty(tokens)) if positions == "abs" else None
        grid = self.grid if positions == "gta" else None

        def make_block(i: int, kind: str, kernel: int, steps: int) -> KuramotoBlock:
            frequencies = make_omega(omega, embed_dim, n, init=omega_init, learned=learn_omega)
            layer = KuramotoLayer(
                embed_dim, n, make_coupling(kind, embed_dim, num_heads=num_heads, grid=grid, kernel_size=kernel),
                num_steps=steps, gamma=gamma, c_norm=c_norm, omega=frequencies, projection=projection, norm=norm,
                self_drift=self_drift,
            )  # fmt: skip
            linear = carry == "linear" and i < depth - 1
            return KuramotoBlock(
                layer, Readout(embed_dim, n), Carry(embed_dim, embed_dim) if linear else nn.Identity()
            )  # fmt: skip

        each = (per_block(coupling, depth, "coupling"), per_block(kernel_size, depth, "kernel_size"),
                steps_per_block(num_steps, depth))  # fmt: skip
        self.blocks = Blocks(map(make_block, range(depth), *each))
        self.norm = nn.Identity()
        self._init_start(n, start_seed)
        self._finish_patches()

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

    def set_steps(self, num_steps: int | Sequence[int]) -> None:
        """T from now on: one for all blocks or one each."""
        for block, steps in zip(self.blocks, steps_per_block(num_steps, len(self.blocks)), strict=True):
            block.kuramoto.num_steps = steps
        update_model_args(self, num_steps=num_steps)

    def _stimulus(self, images: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor, Grid]:
        """Images -> c, x before normalisation [B, N, C] each, and the grid."""
        c, grid = self._embed(images)
        x = self._start(images, grid[0] * grid[1], start)
        if self.pos_c is not None and self.pos_x is not None:
            c = c + resample_tokens(self.pos_c, self.grid, grid, dim=0)
            x = x + resample_tokens(self.pos_x, self.grid, grid, dim=0)
        return c, x.expand(c.shape[0], -1, -1), grid

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
        output = OscillatorOutput()
        recorder = Recorder(output, steps=steps, energies=energy, trajectories=trajectory)
        for block in self.blocks:
            x = recorder.run(block.kuramoto, x, c, grid, self.gamma)
            c = block.readout(x)
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
        self._redraw_start()
