"""The robust classifier of arXiv 2410.13821: K-layers in a pyramid, for 32 px images.

A 3x3 stem; L stages of 1, 2, 4, ... times the channels: a 3x3 convolution of stride 2 (from the second stage on; one
convolution shared by x and c), a K-layer, a readout by 3x3 kernels, a pre-activation residual block and one more
convolution; average pool, linear. Couplings are convolutions with kernels 9, 7, 5, or attention in the last stages
("mixed").

Legend: B images, N = h*w tokens of a stage, n components, K oscillators, C = n*K channels in the order (n, K).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models._input import update_model_args, update_model_input_size
from torch import Tensor, nn

from pretrain.models.backbone import Backbone, Size, map_of, per_block, steps_per_block, tokens_of
from pretrain.models.connectivity import Grid, make_coupling
from pretrain.models.kuramoto import TINY, KuramotoLayer, make_omega, squared_norm
from pretrain.models.oscillators import OscillatorOutput, Recorder, Starts

LEVEL_PARTS = ("kuramoto", "readout")


class ConvReadout(nn.Module):
    """Readout through a convolution: [B, C, h, w] -> C*n channels in the order (n, C) -> norms + bias [B, C, h, w]."""

    def __init__(self, dim: int, n: int, kernel_size: int) -> None:
        super().__init__()
        self.n = n
        self.conv = nn.Conv2d(dim, n * dim, kernel_size, padding=kernel_size // 2)
        self.bias = nn.Parameter(torch.empty(dim))

    def init_weights(self) -> None:
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).float().movedim(1, -1)  # [B, h, w, n*C]
        norms = squared_norm(y, self.n).clamp_min(TINY).sqrt().squeeze(-2)
        return (norms + self.bias).movedim(-1, 1)


class ActivatedConv(nn.Module):
    """BatchNorm (or none), ReLU, convolution."""

    def __init__(self, dim: int, kernel_size: int, *, batch_norm: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim) if batch_norm else nn.Identity()
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2)

    def forward(self, c: Tensor) -> Tensor:
        return self.conv(F.relu(self.norm(c)))


class ReadingStack(nn.Module):
    """Readout, residual block of two activated convolutions, one more. [B, C, h, w] -> [B, C, h, w]."""

    def __init__(self, dim: int, n: int, kernel_size: int, *, batch_norm: bool) -> None:
        super().__init__()
        self.norms = ConvReadout(dim, n, kernel_size)
        self.hidden, self.residual, self.last = (
            ActivatedConv(dim, kernel_size, batch_norm=batch_norm) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.last.conv.weight.dtype
        c = self.norms(x.to(dtype)).to(dtype)
        return self.last(c + self.residual(self.hidden(c)))


class Stage(nn.Module):
    """Transition, K-layer, readout."""

    def __init__(self, down: nn.Conv2d | None, kuramoto: KuramotoLayer, readout: ReadingStack) -> None:
        super().__init__()
        self.down = down
        self.kuramoto = kuramoto
        self.readout: nn.Module = readout

    def enter(self, x: Tensor, c: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Grid]:
        """x and c [B, N, C] of the stage before -> those that this one starts from, and its grid."""
        if self.down is None:
            return x, c, grid
        both = map_of(torch.cat([x, c.to(x.dtype)]), grid).to(self.down.weight.dtype)
        tokens, grid = tokens_of(self.down(both))
        x, c = tokens.chunk(2)
        return x, c, grid

    def read(self, x: Tensor, grid: Grid) -> Tensor:
        """Oscillators [B, N, C] -> c [B, N, C]."""
        return tokens_of(self.readout(map_of(x, grid)))[0]

    def drop_output(self) -> None:
        """Keep the oscillators only (features of this level need no readout)."""
        self.readout = nn.Identity()


class Stages(nn.ModuleList):
    """The stages of one network, typed."""

    def __iter__(self) -> Iterator[Stage]:
        return cast("Iterator[Stage]", super().__iter__())


class KuramotoClassifier(Backbone, Starts):
    """AKOrN as a classifier. Arguments of `Backbone`, and:

    Args:
        img_size: input size; others are taken too.
        in_chans: image channels.
        embed_dim: channels of the first stage; each further stage doubles them.
        depth: stages L.
        n: components of an oscillator; `readout_n` those of the readout.
        num_steps: T, one for all stages or one each.
        gamma: step size; `learn_gamma` learns one for all stages.
        coupling: "conv", "attn" or "none", one for all stages or one each; `kernel_size` likewise.
        num_heads: of attention stages, which have GTA.
        readout_kernel: kernel of readout and residual block.
        batch_norm: BatchNorm in the residual blocks, or no normalisation there.
        c_norm, omega, omega_init, projection, norm, self_drift, start_seed: see AKOrN.
    """

    blocks: Stages

    def __init__(
        self,
        img_size: Size = 32,
        in_chans: int = 3,
        num_classes: int = 10,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depth: int = 3,
        n: int = 2,
        num_steps: int | Sequence[int] = 3,
        gamma: float = 1.0,
        learn_gamma: bool = True,
        coupling: str | Sequence[str] = "conv",
        kernel_size: int | Sequence[int] = (9, 7, 5),
        num_heads: int = 8,
        readout_n: int = 2,
        readout_kernel: int = 3,
        batch_norm: bool = True,
        c_norm: str = "gn",
        omega: str = "global",
        omega_init: float = 1.0,
        projection: bool = True,
        norm: str = "sphere",
        self_drift: bool = False,
        drop_rate: float = 0.0,
        start_seed: int = 0,
    ) -> None:
        last_dim = embed_dim * 2 ** (depth - 1)
        super().__init__(num_classes=num_classes, global_pool=global_pool, num_features=last_dim, drop_rate=drop_rate)
        self.embed_dim, self.img_size = embed_dim, to_2tuple(img_size)
        self.gamma = nn.Parameter(torch.empty(1)) if learn_gamma else None
        self.gamma_init = gamma
        self.stem = nn.Conv2d(in_chans, embed_dim, 3, padding=1, bias=False)
        kernels, kinds = per_block(kernel_size, depth, "kernel_size"), per_block(coupling, depth, "coupling")
        grids = self._grids(depth)

        def make_stage(i: int, kind: str, kernel: int, steps: int) -> Stage:
            dim = embed_dim * 2**i
            frequencies = make_omega(omega, dim, n, init=omega_init)
            layer = KuramotoLayer(
                dim, n, make_coupling(kind, dim, num_heads=num_heads, grid=grids[i], kernel_size=kernel),
                num_steps=steps, gamma=gamma, c_norm=c_norm, omega=frequencies, projection=projection, norm=norm,
                self_drift=self_drift,
            )  # fmt: skip
            down = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1) if i else None
            return Stage(down, layer, ReadingStack(dim, readout_n, readout_kernel, batch_norm=batch_norm))

        steps = steps_per_block(num_steps, depth)
        self.blocks = Stages(map(make_stage, range(depth), kinds, kernels, steps))
        self.norm = nn.Identity()
        self._init_start(n, start_seed)
        levels = [(f"blocks.{i}.{part}", embed_dim * 2**i, 2**i) for i in range(depth) for part in LEVEL_PARTS]
        self._finish([("stem", embed_dim, 1), *levels])

    def init_weights(self) -> None:
        """The model's own parameters; modules initialise theirs."""
        if self.gamma is not None:
            nn.init.constant_(self.gamma, self.gamma_init)

    @property
    def grids(self) -> list[Grid]:
        """Tokens (rows, columns) of each stage."""
        return self._grids(len(self.blocks))

    def _grids(self, depth: int) -> list[Grid]:
        """Tokens of every stage at the model's own input size."""
        grids = [(self.img_size[0], self.img_size[1])]
        for _ in range(depth - 1):
            rows, columns = grids[-1]
            grids.append((-(-rows // 2), -(-columns // 2)))
        return grids

    def start_shape(self, img_size: Size | None = None) -> tuple[int, int]:
        """Shape (N, C) of the initial oscillators of an image of this size (default: the model's own)."""
        height, width = to_2tuple(self.img_size if img_size is None else img_size)
        return height * width, self.embed_dim

    def set_steps(self, num_steps: int | Sequence[int]) -> None:
        """T from now on: one for all stages or one each."""
        for stage, steps in zip(self.blocks, steps_per_block(num_steps, len(self.blocks)), strict=True):
            stage.kuramoto.num_steps = steps
        update_model_args(self, num_steps=num_steps)

    def set_input_size(self, img_size: Size | None = None, patch_size: int | None = None) -> None:
        """Make another input size the model's own; GTA of attention stages is interpolated."""
        if patch_size is not None:
            raise ValueError("the classifier has no patches: leave patch_size out")
        if img_size is not None:
            self.img_size = to_2tuple(img_size)
        update_model_input_size(self, self.img_size)
        for stage, grid in zip(self.blocks, self.grids, strict=True):
            stage.kuramoto.coupling.set_grid(grid)
        self._redraw_start()

    def _stimulus(self, images: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor, Grid]:
        """Images -> c, x before normalisation [B, N, C] each, and the grid."""
        c, grid = tokens_of(self.stem(images))
        return c, self._start(images, grid[0] * grid[1], start).expand(c.shape[0], -1, -1), grid

    def _levels(self, images: Tensor, start: Tensor | None = None) -> Iterator[tuple[Tensor, Grid]]:
        c, x, grid = self._stimulus(images, start)
        yield c, grid
        for stage in self.blocks:
            x, c, grid = stage.enter(x, c, grid)
            x = stage.kuramoto(x, c, grid, gamma=self.gamma)
            yield x, grid
            c = stage.read(x, grid)
            yield c, grid

    def forward_oscillators(
        self, images: Tensor, start: Tensor | None = None, *, steps: int | None = None, trajectory: bool = False,
        energy: bool = False,
    ) -> OscillatorOutput:  # fmt: skip
        """Readouts and oscillators of every stage; energies and trajectories if asked for. See AKOrN."""
        c, x, grid = self._stimulus(images, start)
        output = OscillatorOutput()
        recorder = Recorder(output, steps=steps, energies=energy, trajectories=trajectory)
        for stage in self.blocks:
            x, c, grid = stage.enter(x, c, grid)
            x = recorder.run(stage.kuramoto, x, c, grid, self.gamma)
            c = stage.read(x, grid)
            output.readout.append(map_of(c, grid))
        return output

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer decay and freezing: stem and stages."""
        return {"stem": r"^(?:stem|gamma)", "blocks": r"^blocks\.(\d+)"}
