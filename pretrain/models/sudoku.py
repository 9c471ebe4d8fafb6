"""Sudoku solvers: AKOrN, and as controls ItrSA and a transformer, on the 9x9 grid of cells.

"Artificial Kuramoto Oscillatory Neurons" (arXiv 2410.13821), section on Sudoku: the digits of the puzzle, embedded, are
the stimulus c; x starts as c in given cells and as noise elsewhere; T steps, learned gamma, one learned frequency per
layer, no normalisation of c; readout, a small residual MLP, 9 classes per cell. More steps at test time solve harder
boards. One layer is the published model; further ones take the refined readout as their stimulus.

Legend: B boards, N = 81 cells (row-major), n components, C = n*K channels in the order (n, K), T steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.backbone import initialise, steps_per_block
from pretrain.models.connectivity import AttentionCoupling
from pretrain.models.itrsa import ItrSABlock, ItrSABlocks, make_norm
from pretrain.models.kuramoto import KuramotoLayer, Readout, make_omega
from pretrain.models.oscillators import OscillatorOutput, Recorder, Starts

GRID = (9, 9)
CELLS = 81
KINDS = ("akorn", "itrsa", "transformer")


class Refinement(nn.Module):
    """After the readout: c + W2 relu(W1 relu(c)), then W3 relu of that. [B, N, C] -> [B, N, C]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.hidden, self.residual, self.last = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, c: Tensor) -> Tensor:
        c = c + self.residual(F.relu(self.hidden(F.relu(c))))
        return self.last(F.relu(c))


class SudokuBlock(nn.Module):
    """K-layer, readout, refinement."""

    def __init__(self, kuramoto: KuramotoLayer, readout: Readout, refinement: Refinement) -> None:
        super().__init__()
        self.kuramoto, self.readout, self.refinement = kuramoto, readout, refinement

    def read(self, x: Tensor) -> Tensor:
        """Oscillators [B, N, C] -> refined readout [B, N, C]."""
        return self.refinement(self.readout(x).to(self.refinement.last.weight.dtype))


class SudokuBlocks(nn.ModuleList):
    """The blocks of one network, typed."""

    def __iter__(self) -> Iterator[SudokuBlock]:
        return cast("Iterator[SudokuBlock]", super().__iter__())


@dataclass
class SudokuOutput(OscillatorOutput):
    """`OscillatorOutput` (readout: refined, tokens [B, 81, C]) and the logits [B, 81, 9]."""

    logits: Tensor = None  # type: ignore[assignment]  # always set; a default is needed after the fields with one


class SudokuNet(Starts):
    """A Sudoku solver. Digits in, logits of 9 classes per cell out.

    Args:
        kind: "akorn", "itrsa" (one block iterated T times) or "transformer" (`depth` blocks once).
        embed_dim: channels C.
        depth: blocks L.
        num_heads: attention heads.
        num_steps: T of each block; the transformer has 1.
        n: components of an oscillator.
        gamma: initial step size; `learn_gamma` learns it.
        omega: "none", "pair" or "global"; `omega_init` the initial frequency.
        self_drift: the published quirk without Omega (kuramoto.py).
        mlp_ratio: hidden width of the controls' MLP over C.
        norm_layer: of the controls, "layernorm" or "rmsnorm".
        start_seed: seed of the noise in evaluation.
    """

    def __init__(
        self, kind: str = "akorn", embed_dim: int = 512, depth: int = 1, num_heads: int = 8, num_steps: int = 16,
        n: int = 4, gamma: float = 1.0, learn_gamma: bool = True, omega: str = "global", omega_init: float = 0.5,
        self_drift: bool = False, mlp_ratio: float = 2.0, norm_layer: str = "layernorm", start_seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r} is unknown: one of {', '.join(KINDS)}")
        steps_per_block(num_steps, depth)
        self.kind, self.embed_dim, self.grid = kind, embed_dim, GRID
        self.embedding = nn.Embedding(10, embed_dim)
        self.gamma = nn.Parameter(torch.empty(1)) if learn_gamma and kind == "akorn" else None
        self.gamma_init = gamma
        self._init_start(n, start_seed)
        self.blocks: SudokuBlocks | ItrSABlocks
        if kind == "akorn":

            def make_block() -> SudokuBlock:
                frequencies = make_omega(omega, embed_dim, n, init=omega_init)
                layer = KuramotoLayer(
                    embed_dim, n, AttentionCoupling(embed_dim, num_heads, GRID), num_steps=num_steps, gamma=gamma,
                    c_norm="none", omega=frequencies, self_drift=self_drift,
                )  # fmt: skip
                return SudokuBlock(layer, Readout(embed_dim, n), Refinement(embed_dim))

            self.blocks = SudokuBlocks(make_block() for _ in range(depth))
            self.norm: nn.Module = nn.ReLU()
        else:
            steps, mlp_dim = (1 if kind == "transformer" else num_steps), round(mlp_ratio * embed_dim)
            control = partial(
                ItrSABlock, embed_dim, num_heads, mlp_dim, grid=GRID, num_steps=steps, norm_layer=norm_layer
            )
            self.blocks = ItrSABlocks(control() for _ in range(depth))
            self.norm = make_norm(norm_layer, embed_dim)
        self.head = nn.Linear(embed_dim, 9)
        initialise(self)

    def init_weights(self) -> None:
        if self.gamma is not None:
            nn.init.constant_(self.gamma, self.gamma_init)

    def start_shape(self, img_size: object = None) -> tuple[int, int]:
        """Shape (81, C) of the noise."""
        return CELLS, self.embed_dim

    def set_steps(self, num_steps: int) -> None:
        """T of each block from now on."""
        for block in self.blocks:
            (block.kuramoto if isinstance(block, SudokuBlock) else block).num_steps = num_steps

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the steps in backward instead of keeping their activations."""
        for block in self.blocks:
            parts = (block.kuramoto, block.readout) if isinstance(block, SudokuBlock) else (block,)
            for part in parts:
                part.grad_checkpointing = enable

    def forward(self, digits: Tensor, start: Tensor | None = None, *, steps: int | None = None) -> Tensor:
        """Digits int64 [B, 81], 0 for blank -> logits [B, 81, 9].

        start: noise of blank cells, [B or 1, 81, C] in (n, K) order or [B or 1, K, n, 9, 9].
        steps: T in this call (default: the model's own).
        """
        if isinstance(self.blocks, SudokuBlocks):
            return self.forward_oscillators(digits, start, steps=steps).logits
        x = self.embedding(digits)
        for block in self.blocks:
            x = block(x, GRID, steps)
        return self.head(self.norm(x.to(self.head.weight.dtype)))

    def decode(self, x: Tensor) -> Tensor:
        """Oscillators of the last block [B, 81, C] -> logits [B, 81, 9]."""
        assert isinstance(self.blocks, SudokuBlocks)
        block = cast("SudokuBlock", self.blocks[-1])
        return self.head(self.norm(block.read(x)))

    def forward_oscillators(
        self, digits: Tensor, start: Tensor | None = None, *, steps: int | None = None, trajectory: bool = False,
        energy: bool = False, given: Tensor | None = None, continued: bool = False,
    ) -> SudokuOutput:  # fmt: skip
        """Logits and oscillators; energies and trajectories if asked for. For kind "akorn" only.

        given: cells whose x starts as c, bool [B, 81] (default: those with a digit).
        continued: `start` is the final x of an earlier call on the same puzzles, taken as it is (one layer only).
        """
        if not isinstance(self.blocks, SudokuBlocks):
            raise ValueError(f"the {self.kind} has no oscillators")
        if continued and (start is None or len(self.blocks) > 1):
            raise ValueError("continued=True needs the oscillators of an earlier call, and a model of one layer")
        c = self.embedding(digits)
        x = self._start(digits, CELLS, start)
        if not continued:
            x = torch.where((digits > 0 if given is None else given)[..., None], c.float(), x)
        output = SudokuOutput()
        recorder = Recorder(output, steps=steps, energies=energy, trajectories=trajectory)
        for block in self.blocks:
            x = recorder.run(block.kuramoto, x, c, GRID, self.gamma)
            c = block.read(x)
            output.readout.append(c)
        output.logits = self.head(self.norm(c))
        return output
