"""timm's contract around a stack of blocks over tokens: what every image model here shares.

A subclass yields its feature levels one after the other (`_levels`): the stem, then two per block, the state that the
block's iterations end in and the block's output. Everything that timm asks of a model follows from that.

Legend: B images, N = h*w tokens (row-major), C channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from timm.layers import ClassifierHead, PatchEmbed, to_2tuple
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from pretrain.models.connectivity import Grid

POOLS = ("max", "avg", "avgmax", "catavgmax", "")
Size = int | tuple[int, int] | list[int]
Indices = int | list[int] | tuple[int, ...] | None
Level = tuple[str, int, int]  # name of the module, channels, reduction


def map_of(tokens: Tensor, grid: Grid) -> Tensor:
    """Tokens [B, N, C] as a map [B, C, h, w]: a view, channels last in memory."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def tokens_of(planes: Tensor) -> tuple[Tensor, Grid]:
    """A map [B, C, h, w] as tokens [B, N, C], and its grid."""
    return planes.flatten(2).transpose(1, 2), (planes.shape[2], planes.shape[3])


def per_block(value: Any, depth: int, name: str) -> list[Any]:
    """One value for all blocks, or one for each."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * depth
    if len(value) != depth:
        raise ValueError(f"{name} has {len(value)} values for {depth} blocks: give one for all, or one per block")
    return list(value)


def steps_per_block(num_steps: Any, depth: int) -> list[int]:
    """T of each block, from one number for all or one for each."""
    steps = per_block(num_steps, depth, "num_steps")
    for value in steps:
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"num_steps must be a whole number from 0 on, not {value}")
    return steps


def initialise(model: nn.Module) -> None:
    """Set every parameter, after filling all with NaN: one that no initialiser reaches is seen at the first forward."""
    layers = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.RMSNorm, nn.BatchNorm2d, nn.Embedding)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
        for module in model.modules():
            if isinstance(module, layers):
                module.reset_parameters()
            else:
                getattr(module, "init_weights", _nothing)()


def _nothing() -> None:
    """For modules without parameters of their own."""


class Backbone(nn.Module):
    """Blocks and head. Subclasses set `blocks` and `norm`, define `_levels` and call `_finish`.

    Args:
        num_classes: outputs of the linear head; 0 for none.
        global_pool: "max", "avg", "avgmax", "catavgmax" or "" for none.
        num_features: channels of the last level.
        drop_rate: dropout before the head.
    """

    blocks: nn.ModuleList
    norm: nn.Module

    def __init__(self, *, num_classes: int, global_pool: str, num_features: int, drop_rate: float) -> None:
        super().__init__()
        self.num_classes, self.drop_rate = num_classes, drop_rate
        self.global_pool = global_pool.removeprefix("fast")  # hub exports hold timm's name of the same
        self.num_features = num_features
        self.grad_checkpointing = False

    def _finish(self, levels: Iterable[Level]) -> None:
        """Head, feature levels and weights, once the subclass has its blocks."""
        pool = _pool_type(self.global_pool)
        self.head = ClassifierHead(self.num_features, self.num_classes, pool_type=pool, drop_rate=self.drop_rate)
        self.feature_info = [
            {"module": name, "num_chs": channels, "reduction": reduction} for name, channels, reduction in levels
        ]
        initialise(self)

    @property
    def head_hidden_size(self) -> int:
        """Width of the pooled features before the classifier."""
        return self.head.num_features

    def _levels(self, images: Tensor, start: Tensor | None = None) -> Iterator[tuple[Tensor, Grid]]:
        """Yield (tokens [B, N, C], grid) of every feature level, in order; computes a level only when asked for it."""
        raise NotImplementedError

    def forward_features(self, images: Tensor, start: Tensor | None = None) -> Tensor:
        """Images [B, 3, H, W], normalised, -> the last level, after the output norm where there is one: [B, C, h, w].

        start: for models with oscillators, their initial values before normalisation: [B or 1, N, C] in (n, K) order
            or [B or 1, K, n, h, w].
        """
        for tokens, grid in self._levels(images, start):
            last = tokens, grid
        return map_of(self.norm(last[0].to(images.dtype)), last[1]).to(images.dtype)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map [B, C, h, w] -> logits [B, num_classes]; pooled features with `pre_logits` or without classes."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, images: Tensor, start: Tensor | None = None) -> Tensor:
        """Images [B, 3, H, W], normalised, -> logits [B, num_classes], or pooled features without classes."""
        return self.forward_head(self.forward_features(images, start))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        return_prefix_tokens: bool = False,
        start: Tensor | None = None,
    ) -> Any:
        """Features of several levels, by timm's convention.

        Args:
            x: images [B, 3, H, W].
            indices: last n levels if int, all if None, else these (see `feature_info`).
            norm: apply the output norm to the intermediates.
            stop_early: compute nothing after the last level asked for.
            output_fmt: "NCHW" maps or "NLC" tokens.
            intermediates_only: return the list of intermediates alone.
            output_dict: return {"image_intermediates", "image_features"}.
            return_prefix_tokens: accepted for timm's sake; there are no prefix tokens.
            start: see `forward_features`.

        Returns:
            (final map [B, C, h, w], intermediates), or as told. With `stop_early` the final map is that of the last
            level computed.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt {output_fmt!r} is unknown: NCHW or NLC")
        take, last_level = self._take(indices)
        intermediates = []
        for level, (tokens, grid) in enumerate(self._levels(x, start)):
            if level in take:
                taken = self.norm(tokens.to(x.dtype)) if norm else tokens
                intermediates.append(map_of(taken, grid) if output_fmt == "NCHW" else taken)
            if stop_early and level == last_level:
                break
        if intermediates_only:
            return {"image_intermediates": intermediates} if output_dict else intermediates
        final = map_of(self.norm(tokens.to(x.dtype)), grid).to(x.dtype)
        if output_dict:
            return {"image_intermediates": intermediates, "image_features": final}
        return final, intermediates

    def prune_intermediate_layers(
        self, indices: Indices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the levels `indices` do not need; returns them counted from the first level."""
        take, last_level = self._take(indices)
        self.blocks = self.blocks[: (last_level + 1) // 2]
        if last_level % 2:  # the iterations of the last block, without what follows them
            last: Any = self.blocks[-1]
            last.drop_output()
        self.feature_info = self.feature_info[: last_level + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def _take(self, indices: Indices) -> tuple[list[int], int]:
        """Levels meant by `indices`, counted from the first, and the last of them."""
        chosen = list(indices) if isinstance(indices, list | tuple) else indices
        return feature_take_indices(len(self.feature_info), chosen)

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new linear head, and another pooling if named."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool.removeprefix("fast")
        self.head.reset(num_classes, None if global_pool is None else _pool_type(global_pool))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer decay and freezing: stem, blocks, output norm."""
        return {
            "stem": r"^(?:patch_embed|stem|pos_|gamma)",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that decay would distort: positions, GTA, frequencies, step size, gains."""
        marks = ("gta_", "omega.", "pos_", "gamma", "gain")
        return {name for name, _ in self.named_parameters() if any(mark in name for mark in marks)}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in backward, by step of the iterations, instead of keeping them."""
        for module in self.modules():
            if hasattr(module, "grad_checkpointing"):
                setattr(module, "grad_checkpointing", enable)  # noqa: B010  (torch types attributes as submodules)


class PatchBackbone(Backbone):
    """A backbone whose stem is a patch embedding and whose grid stays the same.

    Args:
        img_size: input size (height, width) or one number; others are taken too, positions being interpolated.
            Sizes that are no multiple of the patch lose the remainder at the right and the bottom.
        patch_size: side of a patch in pixels.
        in_chans: image channels.
        embed_dim: channels C.
        rescale_input: resize images of another size to `img_size` first (bilinear), instead of the positions.
        **head: see `Backbone`.
    """

    level_parts: tuple[str, str]

    def __init__(
        self, *, img_size: Size, patch_size: int, in_chans: int, embed_dim: int, rescale_input: bool, **head: Any
    ) -> None:
        super().__init__(num_features=embed_dim, **head)
        self.embed_dim, self.rescale_input = embed_dim, rescale_input
        height, width = to_2tuple(img_size)
        self.patch_embed = PatchEmbed(
            (height, width), patch_size, in_chans, embed_dim, strict_img_size=False, output_fmt="NCHW"
        )
        if min(self.grid) < 1:
            raise ValueError(f"img_size {height}x{width} is smaller than patch_size {patch_size}")

    def _finish_patches(self) -> None:
        """`_finish` with the levels of a stack over one grid."""
        names = [f"blocks.{i}.{part}" for i in range(len(self.blocks)) for part in self.level_parts]
        reduction = max(self.patch_embed.patch_size)
        self._finish((name, self.embed_dim, reduction) for name in ["patch_embed", *names])

    @property
    def grid(self) -> Grid:
        """Tokens (rows, columns) at the model's own input size."""
        rows, columns = self.patch_embed.grid_size
        return rows, columns

    def _embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Images [B, 3, H, W] -> patch embedding [B, N, C] and its grid."""
        size = self.patch_embed.img_size
        if self.rescale_input and images.shape[-2:] != size:
            images = nn.functional.interpolate(images, size=size, mode="bilinear", align_corners=False)
        images = images.contiguous(memory_format=torch.channels_last)  # so that tokens come out contiguous
        return tokens_of(self.patch_embed.proj(images))

    def set_input_size(self, img_size: Size | None = None, patch_size: int | None = None) -> None:
        """Make another input size (or patch size) the model's own; positions and patches are interpolated."""
        old = self.grid
        self.patch_embed.set_input_size(None if img_size is None else to_2tuple(img_size), patch_size)
        for info in self.feature_info:
            info["reduction"] = max(self.patch_embed.patch_size)
        update_model_input_size(self, self.patch_embed.img_size, patch_size=patch_size)
        if self.grid != old:
            self._regrid(old)

    def _regrid(self, old: Grid) -> None:
        """Adapt what is stored by position after the grid has changed from `old`."""
        raise NotImplementedError


def _pool_type(global_pool: str) -> str:
    """timm's name of a pooling: over the map directly, but for the maximum, whose adjoint writes one value only."""
    name = global_pool.removeprefix("fast")
    if name not in POOLS:
        raise ValueError(f"global_pool {global_pool!r} is unknown: max, avg, avgmax, catavgmax or '' for none")
    return f"fast{name}" if name not in ("", "max") else name
