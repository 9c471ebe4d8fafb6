"""Where a backbone comes from: `--ckpt` as a run, an export, a weights file or a timm name.

Owns: telling these apart, and strict loading: weights that do not fit, or that give other features than when they were
exported, are errors and never random features.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from configs.errors import UserError
from downstream.encoder import Control, Encoder, apply_control
from pretrain import kernels
from pretrain.distributed import own_device
from pretrain.export import exported


def load(
    ckpt: str,
    *,
    arch: str | None = None,
    args: Mapping[str, Any] | None = None,
    img_size: int | None = None,
    control: Control | None = None,
    steps: int | None = None,
    layer: str = "readout",
    device: str | None = None,
    precision: str = "fp32",
    seed: int = 0,
) -> Encoder:
    """Read a backbone.

    Args:
        ckpt: folder of a run (its export, or else its newest checkpoint), folder of an export, a weights file (of the
            published AKOrN code, or of `arch`), or a timm model name (pretrained weights from its hub).
        arch: timm name for a bare weights file. args: its arguments; published names for a published file.
        img_size: side the model is to see; None: the model's own where its size is fixed, else as images come.
        control: "random" (untrained weights, from `seed`), "uncoupled" or "no_steps".
        steps: T at test time.

    Raises:
        UserError: there is no such thing, or its weights do not fit.
    """
    source = _Source(ckpt, arch, dict(args or {}), random=control == "random", seed=seed, img_size=img_size)
    model: Any = source.model()
    if not hasattr(model, "feature_info"):
        raise UserError(f"{ckpt} does not tell its feature levels (feature_info): choose another model of timm's")
    if steps is not None and not hasattr(model, "set_steps"):
        raise UserError(f"steps={steps} needs a model with oscillators or iterations, which {ckpt} is not")
    where = own_device(device)
    name = source.label if control is None else f"{source.label} ({control})"
    side = img_size
    if _has_fixed_size(model):
        side = model.pretrained_cfg["input_size"][-1] if img_size is None else _resized(model, img_size, ckpt)
    try:
        encoder = Encoder(model, name=name, side=side, layer=layer, device=where, precision=precision)
        if steps is not None:
            encoder.model.set_steps(steps)
        if control is not None:
            apply_control(encoder, control)
        encoder.level(layer)  # raises where there is none
    except ValueError as error:
        raise UserError(str(error)) from None
    kernels.fastest(encoder.model)
    if encoder.side is not None and not encoder.has_oscillators:
        _check_size(encoder, ckpt)
    return encoder


class _Source:
    """One `--ckpt`, told apart."""

    def __init__(
        self, ckpt: str, arch: str | None, args: dict[str, Any], *, random: bool, seed: int, img_size: int | None
    ) -> None:
        import pretrain  # registers our models with timm  # noqa: F401

        self.ckpt, self.arch, self.args = ckpt, arch, args
        self.path = Path(ckpt) if arch else _whole(Path(ckpt))
        self.random, self.seed, self.img_size = random, seed, img_size
        self.label = self.path.resolve().name if self.path.exists() else ckpt

    def model(self) -> nn.Module:
        refuse_arguments(self.path, self.args)
        if self.path.is_dir():
            return self._of_folder()
        if self.path.is_file():
            return self._of_file()
        if "/" in self.ckpt and ":" not in self.ckpt:
            raise UserError(f"no run, export or weights file {self.ckpt!r}; runs lie in runs/NAME")
        return self._of_timm(self.ckpt)

    def _of_folder(self) -> nn.Module:
        if self.path.name == "export":
            self.label = self.path.resolve().parent.name
        with exported(self.path) as folder:
            return self._of_export(folder)

    def _of_export(self, folder: Path) -> nn.Module:
        from pretrain import fingerprint

        config = json.loads((folder / "config.json").read_text())
        if "pretrained_cfg" not in config:
            raise UserError(f"{self.ckpt} is no model of images: {config.get('architecture')}")
        if config.get("num_classes") and (folder / fingerprint.FILE).is_file():  # a fingerprint of logits
            raise UserError(f"{self.ckpt} is a classifier, which robustness.py tests; here is a backbone wanted")
        if self.random:
            return self._created(config["architecture"], **config.get("model_args", {}))
        model = self._created(f"local-dir:{folder.resolve()}", pretrained=True)
        if (folder / fingerprint.FILE).is_file():
            fingerprint.check(model, folder)
        return model

    def _of_file(self) -> nn.Module:
        from pretrain.models.reference import load_published

        self.label = self.path.stem
        try:
            if self.arch is not None:
                return self._of_arch(self.arch)
            published = load_published(self.path, self.args).model
        except (ValueError, KeyError) as error:
            raise UserError(f"{self.ckpt}: {error}; a file of a timm model needs --arch NAME") from error
        if self.random:
            from pretrain.models.backbone import initialise

            torch.manual_seed(self.seed)
            initialise(published)
        return _with_published_cfg(published)

    def _of_arch(self, name: str) -> nn.Module:
        """timm's model with the weights of a file, which are of the size asked for or of the model's own."""
        from pretrain.models.reference import read_state

        model = self._created(name, **self.args)
        if self.random:
            return model
        state = read_state(self.path)
        try:
            _load(model, state, str(self.path))
        except UserError:
            model = self._created(name, sized=False, **self.args)
            _load(model, state, str(self.path))
        return model

    def _of_timm(self, name: str) -> nn.Module:
        import timm

        architecture = name.split(".")[0]
        if ":" not in name and not timm.is_model(architecture):
            from configs.models import nearest

            raise UserError(
                f"{name!r} is no run, export, weights file or model of timm's" + nearest(name, timm.list_models())
            )
        return self._created(name, pretrained=not self.random, **self.args)

    def _created(self, name: str, *, pretrained: bool = False, sized: bool = True, **args: Any) -> nn.Module:
        """timm's model without classifier, at the size asked for where its size is fixed and can be chosen."""
        import timm

        options = {**args, "pretrained": pretrained, "num_classes": 0}
        try:
            if sized and self.img_size is not None and "akorn" not in name and not name.startswith("local-dir"):
                # A network without a fixed size takes no img_size, others only some.
                with contextlib.suppress(TypeError, AssertionError, RuntimeError):
                    torch.manual_seed(self.seed)
                    return timm.create_model(name, **{"img_size": self.img_size, **options})
            torch.manual_seed(self.seed)
            return timm.create_model(name, **options)
        except TypeError as error:
            raise UserError(f"{name}: {error}") from error
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"{name} cannot be loaded: {str(error).splitlines()[0]}; pretrained weights of timm come from the "
                "network (set HF_HOME to a folder that has them), random ones need --controls random"
            ) from error


def refuse_arguments(path: Path, args: Mapping[str, Any]) -> None:
    """Raise a UserError where a run or an export, which says what it is, is given arguments: they would do nothing."""
    if args and path.is_dir():
        raise UserError(
            f"args {', '.join(args)}: {path} says itself what it is; arguments are for weights files and names of timm"
        )


def _whole(path: Path) -> Path:
    """The export or checkpoint that a path inside of it stands for."""
    beside = {"model.safetensors": "config.json", "weights.safetensors": "manifest.json"}
    return path.parent if path.name in beside and (path.parent / beside[path.name]).is_file() else path


def _has_fixed_size(model: Any) -> bool:
    """Whether images must have the model's own size (timm's vision transformers, say). AKOrN takes any."""
    if hasattr(model, "start_shape") or hasattr(model, "forward_oscillators"):
        return False
    embedding = getattr(model, "patch_embed", None)
    return bool(getattr(embedding, "strict_img_size", False))


def _resized(model: Any, img_size: int, ckpt: str) -> int:
    """Make a model of a fixed size take images of `img_size` px, or of the next size that its patches divide.

    Raises:
        UserError: it cannot.
    """
    patch, own = model.feature_info[-1]["reduction"], tuple(model.patch_embed.img_size)
    side = max(1, round(img_size / patch)) * patch
    if own != (side, side):
        if not hasattr(model, "set_input_size"):
            raise UserError(f"{ckpt} takes images of {own[0]} px only: give --input-size {own[0]}")
        model.set_input_size(side)
    return side


def _check_size(encoder: Encoder, ckpt: str) -> None:
    """Raise a UserError where a network cannot see images of the encoder's size (too small, odd for its windows)."""
    assert encoder.side is not None
    try:
        encoder.encode(torch.zeros(1, 3, encoder.side, encoder.side))
    except (RuntimeError, AssertionError, ValueError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{ckpt} cannot be evaluated at {encoder.side} px ({said}): give another --input-size, or --layer"
        ) from error


def _load(model: nn.Module, state: dict[str, torch.Tensor], where: str) -> None:
    """Load by name, or by order where the names are another library's and all shapes agree; the head may be missing."""
    own = model.state_dict()
    named = {key: value for key, value in state.items() if key in own}
    if len(named) < len(own):
        pairs = list(zip(own.items(), state.items()))
        fits = len(state) >= len(own) and all(mine.shape == theirs.shape for (_, mine), (_, theirs) in pairs)
        if not fits:
            missing = [key for key in own if key not in state][:3]
            raise UserError(f"{where} does not fit the model: it lacks {', '.join(missing)} and its order differs")
        named = {key: value for (key, _), (_, value) in pairs}
    try:
        model.load_state_dict(named, strict=True)
    except RuntimeError as error:
        raise UserError(f"{where} does not fit the model: {str(error).splitlines()[-1].strip()}") from error


def _with_published_cfg(model: Any) -> nn.Module:
    """The published code scales images by mean 0.5 and std 0.5."""
    if not getattr(model, "pretrained_cfg", None):
        side = model.patch_embed.img_size[-1] if hasattr(model, "patch_embed") else 32
        model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "input_size": (3, side, side)}
    return model
