"""Sizes of the family, registered with timm. Importing this file registers them."""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from pretrain.models.akorn import AKOrN

GAP = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bicubic", "crop_pct": 1.0}


def _sizes() -> dict[str, dict[str, Any]]:
    """Constructor arguments of every AKOrN backbone, by name."""
    flagship: dict[str, dict[str, Any]] = {
        "tiny": {"embed_dim": 256, "depth": 1, "num_heads": 8},
        "small": {"embed_dim": 384, "depth": 2, "num_heads": 6},
        "base": {"embed_dim": 768, "depth": 3, "num_heads": 12},
        "large": {"embed_dim": 1024, "depth": 4, "num_heads": 16},
    }
    sizes = {f"akorn_{name}_patch16_256": {"img_size": 256, "patch_size": 16, **flagship[name]} for name in flagship}
    for name in ("small", "base"):
        sizes[f"akorn_{name}_patch8_256"] = {"img_size": 256, "patch_size": 8, **flagship[name]}
    clevrtex = {"img_size": 128, "patch_size": 8, "embed_dim": 256, "num_heads": 8}
    sizes["akorn_clevrtex_l1_patch8_128"] = {**clevrtex, "depth": 1}
    sizes["akorn_clevrtex_l2_patch8_128"] = {**clevrtex, "depth": 2}
    sizes["akorn_clevrtex_large_patch8_128"] = {**clevrtex, "depth": 2, "embed_dim": 512}
    nano = {"patch_size": 4, "embed_dim": 128, "depth": 1, "num_heads": 8, "c_norm": "none"}
    for size in (32, 64):
        sizes[f"akorn_nano_patch4_{size}"] = {**nano, "img_size": size}
        sizes[f"akorn_conv_nano_patch4_{size}"] = {**nano, "img_size": size, "coupling": "conv", "positions": "abs"}
    sizes["akorn_conv_clevrtex_l1_patch8_128"] = {
        **clevrtex, "depth": 1, "coupling": "conv", "positions": "abs", "c_norm": "sandb",
    }  # fmt: skip
    return sizes


SIZES = _sizes()


def _cfg(size: dict[str, Any]) -> dict[str, Any]:
    side, grid = size["img_size"], size["img_size"] // size["patch_size"]
    return {
        "url": "", "num_classes": 1000, "input_size": (3, side, side), "pool_size": (grid, grid),
        "first_conv": "patch_embed.proj", "classifier": "head.fc", "license": "apache-2.0", **GAP,
    }  # fmt: skip


default_cfgs = generate_default_cfgs({name: _cfg(size) for name, size in SIZES.items()})


def _register(name: str, size: dict[str, Any]) -> None:
    """Register one entry point; timm finds it, and its default configuration, by its name and module."""

    def entry(pretrained: bool = False, **kwargs: Any) -> AKOrN:
        out_indices = kwargs.pop("out_indices", tuple(range(2 * size["depth"] + 1)))
        return build_model_with_cfg(
            AKOrN, name, pretrained, feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
            **{**size, **kwargs},
        )  # fmt: skip

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"{name}: see docs/models.md."
    globals()[name] = register_model(entry)


for _name, _size in SIZES.items():
    _register(_name, _size)
