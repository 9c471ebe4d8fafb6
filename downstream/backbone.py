"""Where a backbone comes from: `--ckpt` as a run, an export, a weights file or a timm name.

Owns: telling these apart, and strict loading: weights that do not fit, or that give other features than when they were
exported, are errors and never random features.
"""

from __future__ import annotations

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
    if img_size is not None and _has_fixed_size(model):
        patch = model.feature_info[-1]["reduction"]
        fitting = max(1, round(img_size / patch)) * patch
        if tuple(model.patch_embed.img_size) != (fitting, fitting):
            model.set_input_size(fitting)
    side = img_size or (model.pretrained_cfg["input_size"][-1] if _has_fixed_size(model) else None)
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
        from pretrain.models.reference import load_published, read_state

        self.label = self.path.stem
        try:
            if self.arch is not None:
                model = self._created(self.arch, **self.args)
                if not self.random:
                    _load(model, read_state(self.path), str(self.path))
                return model
            published = load_published(self.path, self.args).model
        except (ValueError, KeyError) as error:
            raise UserError(f"{self.ckpt}: {error}; a file of a timm model needs --arch NAME") from error
        if self.random:
            from pretrain.models.backbone import initialise

            torch.manual_seed(self.seed)
            initialise(published)
        return _with_published_cfg(published)

    def _of_timm(self, name: str) -> nn.Module:
        import timm

        architecture = name.split(".")[0]
        if ":" not in name and not timm.is_model(architecture):
            from configs.models import nearest

            raise UserError(
                f"{name!r} is no run, export, weights file or model of timm's" + nearest(name, timm.list_models())
            )
        return self._created(name, pretrained=not self.random, **self.args)

    def _created(self, name: str, *, pretrained: bool = False, **args: Any) -> nn.Module:
        """timm's model without classifier, at the size asked for where its size is fixed."""
        import timm

        torch.manual_seed(self.seed)
        sized = (
            {}
            if self.img_size is None or "akorn" in name or name.startswith("local-dir")
            else {"img_size": self.img_size}
        )
        options = {**sized, **args, "pretrained": pretrained, "num_classes": 0}
        try:
            return timm.create_model(name, **options)
        except TypeError as error:  # a network without a fixed size takes no img_size
            if "img_size" not in str(error):
                raise UserError(f"{name}: {error}") from error
            options.pop("img_size", None)
            return timm.create_model(name, **options)
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
