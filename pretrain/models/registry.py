"""Sizes of the family, registered with timm: importing this file registers them. docs/models.md lists them all.

Every AKOrN with attention has an ItrSA twin of the same width, depth, heads, steps and positions. Recipes: the flagship
family (256 px) is this project's own; CLEVRTex and nano (Tetrominoes, dSprites) are the published architectures, with
the plain equation's gamma 0.5 where the published code says 1.

Weights that come with the package lie in weights/, a file MODEL.TAG.safetensors each:
`timm.create_model("akorn_nano_patch4_32.tetrominoes", pretrained=True)` loads one, offline.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._input import get_pretrained_grid_size
from torch import Tensor, nn

from pretrain.models.akorn import AKOrN
from pretrain.models.classifier import KuramotoClassifier
from pretrain.models.connectivity import Grid
from pretrain.models.itrsa import ItrSA
from pretrain.models.positions import resample_tokens

Size = dict[str, Any]

FLAGSHIP: dict[str, Size] = {
    "tiny": {"embed_dim": 256, "depth": 1, "num_heads": 8},
    "small": {"embed_dim": 384, "depth": 2, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 3, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 4, "num_heads": 16},
}
CLEVRTEX: Size = {"img_size": 128, "patch_size": 8, "embed_dim": 256, "num_heads": 8}
NANO: Size = {"patch_size": 4, "embed_dim": 128, "depth": 1, "num_heads": 8}
CONV: Size = {"coupling": "conv", "kernel_size": 5, "positions": "abs"}
MIXED: Size = {"coupling": ("conv", "conv", "attn")}
TABLES = {"gta_in": 2, "gta_out": 2, "pos_c": 0, "pos_x": 0, "pos_embed": 0}  # dimension of their tokens
WEIGHTS = Path(__file__).with_name("weights")


def _attention_sizes() -> dict[str, Size]:
    """Width, depth, heads, input and patch of the attention models, by the name without its family."""
    sizes = {f"{name}_patch16_256": {"img_size": 256, "patch_size": 16, **size} for name, size in FLAGSHIP.items()}
    for name in ("small", "base"):
        sizes[f"{name}_patch8_256"] = {"img_size": 256, "patch_size": 8, **FLAGSHIP[name]}
    sizes["clevrtex_l1_patch8_128"] = {**CLEVRTEX, "depth": 1}
    sizes["clevrtex_l2_patch8_128"] = {**CLEVRTEX, "depth": 2}
    sizes["clevrtex_large_patch8_128"] = {**CLEVRTEX, "depth": 2, "embed_dim": 512}
    for side in (32, 64):
        sizes[f"nano_patch4_{side}"] = {**NANO, "img_size": side}
    sizes["nano_l2_patch4_32"] = {**NANO, "img_size": 32, "depth": 2, "num_steps": 3}
    return sizes


def _models() -> dict[str, tuple[type[nn.Module], Size]]:
    """Class and constructor arguments of every model, by name."""
    models: dict[str, tuple[type[nn.Module], Size]] = {}
    for name, size in _attention_sizes().items():
        models[f"akorn_{name}"] = AKOrN, {**size, "c_norm": "none"} if name.startswith("nano_patch") else size
        models[f"itrsa_{name}"] = ItrSA, size
    for side in (32, 64):
        models[f"akorn_conv_nano_patch4_{side}"] = AKOrN, {**NANO, **CONV, "img_size": side, "c_norm": "none"}
    models["akorn_conv_clevrtex_l1_patch8_128"] = AKOrN, {**CLEVRTEX, **CONV, "depth": 1}
    models["akorn_classifier_32"] = KuramotoClassifier, {}
    models["akorn_classifier_mixed_32"] = KuramotoClassifier, MIXED
    return models


MODELS = _models()


def _cfg(model: type[nn.Module], size: Size) -> dict[str, Any]:
    """timm's default configuration of one model."""
    side = size.get("img_size", 32)
    grid = 8 if model is KuramotoClassifier else side // size["patch_size"]
    return {
        "url": "",
        "num_classes": 10 if model is KuramotoClassifier else 1000,
        "input_size": (3, side, side),
        "pool_size": (grid, grid),
        "first_conv": "stem" if model is KuramotoClassifier else "patch_embed.proj",
        "classifier": "head.fc",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "license": "apache-2.0",
    }


def _cfgs() -> dict[str, Any]:
    """Of what lies in WEIGHTS, and of every model without weights, its default (the asterisk says so to timm)."""
    trained = {
        path.stem: {**_cfg(*MODELS[path.stem.split(".")[0]]), "num_classes": 0, "file": str(path)}
        for path in sorted(WEIGHTS.glob("*.safetensors"))
    }
    return {**trained, **{f"{name}.*": _cfg(*model) for name, model in MODELS.items()}}


default_cfgs = generate_default_cfgs(_cfgs())


def _fitted(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights for another `img_size` than their own: tables of positions interpolated, as `set_input_size` does it.

    Their own grid is what the folder or tag says; else it is taken to be square. Loading names what does not fit then.
    """
    own, fitted = model.state_dict().keys(), dict(state)
    for name in own & state.keys():
        parent, _, kind = name.rpartition(".")
        if kind in TABLES:
            tokens, grid = state[name].shape[TABLES[kind]], cast("Grid", model.get_submodule(parent).grid)
            old = get_pretrained_grid_size(model, state.get("patch_embed.proj.weight"), tokens)
            if old is None and math.isqrt(tokens) ** 2 == tokens != grid[0] * grid[1]:
                old = math.isqrt(tokens), math.isqrt(tokens)
            if old is not None:
                fitted[name] = resample_tokens(state[name], old, grid, dim=TABLES[kind])
    return fitted


def _register(name: str, model: type[nn.Module], size: Size) -> None:
    """Register one entry point; timm finds it, and its default configuration, by its name and this module."""

    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        depth: int = kwargs["depth"] if "depth" in kwargs else size.get("depth", 3)
        out_indices = kwargs.pop("out_indices", tuple(range(2 * depth + 1)))
        return build_model_with_cfg(
            model, name, pretrained, feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
            pretrained_filter_fn=_fitted, **{**size, **kwargs},
        )  # fmt: skip

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"{name}: see docs/models.md."
    globals()[name] = register_model(entry)


for _name, (_model, _size) in MODELS.items():
    _register(_name, _model, _size)
