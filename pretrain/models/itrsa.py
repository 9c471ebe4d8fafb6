"""ItrSA, the control of arXiv 2410.13821: iterated self-attention without oscillators.

Pre-norm attention with residual, T times with the same weights, then an MLP with residual; T = 1 and several blocks is
a ViT. The published commands give ItrSA absolute positions while AKOrN has GTA; ours has the same GTA by default, so
that the two differ in the dynamics only. With `mlp_ratio` 2 a block has the matrix parameters of an AKOrN block of
n = 4. `norm_layer="rmsnorm"` is the variant of arXiv 2505.19458, which also gains from more steps on Sudoku.

Legend: B images, N = h*w tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from timm.models._input import update_model_args
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.models.backbone import PatchBackbone, Size, steps_per_block
from pretrain.models.connectivity import AttentionCoupling, Grid
from pretrain.models.positions import resample_tokens, sine_cosine


def make_norm(kind: str, dim: int) -> nn.Module:
    """Normalisation over channels: "layernorm" or "rmsnorm"."""
    if kind == "layernorm":
        return nn.LayerNorm(dim, eps=1e-5)
    if kind == "rmsnorm":
        return nn.RMSNorm(dim, eps=1e-5)
    raise ValueError(f"norm_layer {kind!r} is unknown: layernorm or rmsnorm")


class ItrSABlock(nn.Module):
    """x <- x + attention(norm(x)), T times; then x + mlp(norm(x)). The residual stream is fp32."""

    def __init__(
        self, dim: int, num_heads: int, mlp_dim: int, *, grid: Grid | None, num_steps: int,
        norm_layer: str = "layernorm",
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_steps = num_steps
        self.norm1, self.norm2 = make_norm(norm_layer, dim), make_norm(norm_layer, dim)
        self.attn = AttentionCoupling(dim, num_heads, grid)
        self.mlp: nn.Module = nn.Sequential(nn.Linear(dim, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, dim))
        self.grad_checkpointing = False

    def iterate(self, x: Tensor, grid: Grid, num_steps: int | None = None) -> Tensor:
        """The T steps of attention, [B, N, C] -> [B, N, C]."""
        positions = self.attn.positions(grid)
        dtype = self.attn.qkv.weight.dtype

        def step(x: Tensor) -> Tensor:
            return x + self.attn(self.norm1(x.to(dtype)), grid, positions)

        x = x.float()
        recompute = self.grad_checkpointing and torch.is_grad_enabled()
        for _ in range(self.num_steps if num_steps is None else num_steps):
            x = checkpoint(step, x, use_reentrant=False) if recompute else step(x)
        return x

    def refine(self, x: Tensor) -> Tensor:
        """The MLP, [B, N, C] -> [B, N, C]."""
        return x + self.mlp(self.norm2(x.to(self.attn.qkv.weight.dtype)))

    def forward(self, x: Tensor, grid: Grid, num_steps: int | None = None, *, refined: bool = True) -> Tensor:
        """The whole block, or without `refined` its iterations: what is called like this is compiled on GPUs."""
        x = self.iterate(x, grid, num_steps)
        return self.refine(x) if refined else x

    def drop_output(self) -> None:
        """Keep the iterations only (features of this level need no MLP)."""
        self.norm2, self.mlp = nn.Identity(), nn.Identity()


class ItrSABlocks(nn.ModuleList):
    """The blocks of one network, typed."""

    def __iter__(self) -> Iterator[ItrSABlock]:
        return cast("Iterator[ItrSABlock]", super().__iter__())


class ItrSA(PatchBackbone):
    """ItrSA for images. Arguments of `PatchBackbone`, and:

    Args:
        depth: blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over C.
        num_steps: T, one for all blocks or one each; 1 makes a ViT.
        positions: "gta", "abs" (sine/cosine added to the patches, learned from there; as published) or "none".
        norm_layer: "layernorm" or "rmsnorm".
    """

    level_parts = ("attn", "mlp")
    blocks: ItrSABlocks

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
        mlp_ratio: float = 2.0,
        num_steps: int | Sequence[int] = 8,
        positions: str = "gta",
        norm_layer: str = "layernorm",
        drop_rate: float = 0.0,
        rescale_input: bool = False,
    ) -> None:
        super().__init__(
            img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim,
            rescale_input=rescale_input, num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate,
        )  # fmt: skip
        if positions not in ("gta", "abs", "none"):
            raise ValueError(f"positions {positions!r} is unknown: gta, abs or none")
        tokens = self.grid[0] * self.grid[1]
        self.pos_embed = nn.Parameter(torch.empty(tokens, embed_dim)) if positions == "abs" else None
        grid = self.grid if positions == "gta" else None
        self.blocks = ItrSABlocks(
            ItrSABlock(
                embed_dim, num_heads, round(mlp_ratio * embed_dim), grid=grid, num_steps=steps, norm_layer=norm_layer
            )
            for steps in steps_per_block(num_steps, depth)
        )
        self.norm = make_norm(norm_layer, embed_dim)
        self._finish_patches()

    def init_weights(self) -> None:
        """The model's own parameters; modules initialise theirs."""
        if self.pos_embed is not None:
            self.pos_embed.copy_(sine_cosine(self.grid, self.embed_dim))

    def set_steps(self, num_steps: int | Sequence[int]) -> None:
        """T from now on: one for all blocks or one each."""
        for block, steps in zip(self.blocks, steps_per_block(num_steps, len(self.blocks)), strict=True):
            block.num_steps = steps
        update_model_args(self, num_steps=num_steps)

    def _levels(self, images: Tensor, start: Tensor | None = None) -> Iterator[tuple[Tensor, Grid]]:
        if start is not None:
            raise ValueError("ItrSA has no oscillators: leave `start` out")
        x, grid = self._embed(images)
        if self.pos_embed is not None:
            x = x + resample_tokens(self.pos_embed, self.grid, grid, dim=0)
        yield x, grid
        for block in self.blocks:
            x = block(x, grid, refined=False)
            yield x, grid
            x = block.refine(x)
            yield x, grid

    def _regrid(self, old: Grid) -> None:
        for block in self.blocks:
            block.attn.set_grid(self.grid)
        if self.pos_embed is not None:
            with torch.no_grad():
                resampled = resample_tokens(self.pos_embed, old, self.grid, dim=0).contiguous()
            self.pos_embed = nn.Parameter(resampled, requires_grad=self.pos_embed.requires_grad)
