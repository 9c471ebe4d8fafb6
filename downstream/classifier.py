"""Where a classifier comes from, and labelled images for testing it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from configs.errors import UserError
from downstream.attacks.victim import Victim
from downstream.backbone import refuse_arguments
from pretrain import kernels
from pretrain.distributed import own_device
from pretrain.export import exported


@dataclass(frozen=True)
class Classifier:
    """A network in evaluation mode with its normalisation."""

    model: nn.Module
    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    device: torch.device

    def victim(self, draws: int = 0, *, seed: int = 0) -> Victim:
        """As something to attack: with its own fixed start (draws 0), or so many random starts for every query."""
        victim = Victim(self.model, mean=self.mean, std=self.std, seed=seed)
        return victim.with_draws(draws, seed=seed) if draws else victim

    def check_size(self, side: int) -> None:
        """Raise a UserError where the network takes images of another size only (timm's vision transformers)."""
        embedding: Any = getattr(self.model, "patch_embed", None)
        if getattr(embedding, "strict_img_size", False) and side not in embedding.img_size:
            own = embedding.img_size[0]
            raise UserError(f"{self.name} takes images of {own} px only, these have {side}: give --size {own}")


def load(
    ckpt: str, *, arch: str | None = None, args: Mapping[str, Any] | None = None, device: str | None = None
) -> Classifier:
    """Read a classifier.

    Args:
        ckpt: folder of a run (its export, or else its newest checkpoint) or of an export, a weights file of `arch`, or
            a timm model name.
        args: arguments of the model, e.g. {num_classes: 10}.

    Raises:
        UserError: there is no such thing, it has no classes, or its weights do not fit.
    """
    path = Path(ckpt)
    where = own_device(device)
    refuse_arguments(path, args or {})
    model = _of_folder(path) if path.is_dir() else _of_file_or_name(ckpt, arch, dict(args or {}))
    num_classes = int(getattr(model, "num_classes", 0))
    if num_classes < 2:
        raise UserError(f"{ckpt} has no classes: it is a backbone; task classify (classify.yaml) trains classifiers")
    cfg = model.pretrained_cfg
    model = model.eval().requires_grad_(False).to(where)
    kernels.fastest(model)
    name = path.resolve().name if path.exists() else ckpt
    return Classifier(model, name, tuple(cfg["mean"]), tuple(cfg["std"]), num_classes, where)


def _of_folder(ckpt: Path) -> Any:
    """The model of a run or an export; errors name the folder that the user gave."""
    import timm

    import pretrain  # noqa: F401  (registers the models of this project)
    from pretrain import fingerprint
    from pretrain.quiet import quiet

    with exported(ckpt) as folder:
        try:
            with quiet():
                model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise UserError(f"{ckpt} cannot be loaded: {_said(error)}") from error
        if (folder / fingerprint.FILE).is_file():
            fingerprint.check(model, folder)
    return model


def _of_file_or_name(ckpt: str, arch: str | None, args: dict[str, Any]) -> Any:
    import timm

    import pretrain  # noqa: F401  (registers the models of this project)

    path = Path(ckpt)
    try:
        if path.is_file() and arch is None:
            return _published(path, args)
        if path.is_file() and arch is not None:
            return timm.create_model(arch, checkpoint_path=str(path), **args)
        if not timm.is_model(ckpt.split(".")[0]):
            raise UserError(f"{ckpt!r} is no run, export, weights file or model of timm's")
        return timm.create_model(ckpt, pretrained=True, **args)
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"{ckpt} cannot be loaded: {_said(error)}") from error


def _said(error: Exception) -> str:
    """The line of an error that tells most: the first, or what stands below a heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[1] if lines[0].endswith(":") and len(lines) > 1 else lines[0]


def _published(path: Path, args: dict[str, Any]) -> Any:
    """A classifier of the published AKOrN code: its images are scaled by mean .5 and deviation .5."""
    from pretrain.models.reference import load_published

    model: Any = load_published(path, args).model
    if not hasattr(model, "pretrained_cfg"):
        model.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    return model


@dataclass(frozen=True)
class Labelled:
    """Images uint8 [N, S, S, 3] and labels int64 [N]."""

    images: np.ndarray
    labels: np.ndarray

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images float32 [N, 3, S, S] in [0, 1], and labels."""
        images = torch.from_numpy(self.images).to(device).movedim(3, 1).float() / 255
        return images.contiguous(), torch.from_numpy(self.labels).to(device)


def read(location: str | None, *, limit: int | None, size: int | None, num_classes: int) -> Labelled:
    """The first images of a labelled shard set, shorter side resized to `size` and centre-cropped where they differ.

    Raises:
        UserError: no data, a sample that cannot be read, no labels, or labels beyond the classifier's classes.
    """
    if location is None:
        raise UserError("no data to test on: give --data SHARDS (made by pretrain/make_shards.py)")
    from pretrain.data.decode import BrokenImageError
    from pretrain.data.index import ShardIndex
    from pretrain.data.shards import DamagedSample, ShardReader

    index = ShardIndex.open(location)
    reader, count = ShardReader(index), min(limit or len(index), len(index))
    images, labels = [], []
    for sample in range(count):
        label = index.label(sample)
        if label is None or not 0 <= label < num_classes:
            raise UserError(f"{location}: sample {sample} has label {label}; the classifier has {num_classes} classes")
        try:
            image = _image(reader.read(sample), size)
        except (BrokenImageError, DamagedSample) as error:
            raise UserError(f"{location}: sample {index.keys([sample])[0]} cannot be read: {error}") from error
        size = size or image.shape[0]
        images.append(image)
        labels.append(label)
    if not images:
        raise UserError(f"{location} has no samples")
    return Labelled(np.stack(images), np.asarray(labels, dtype=np.int64))


def _image(parts: Mapping[str, bytes], size: int | None) -> np.ndarray:
    """The image of a sample as a square uint8 [S, S, 3]."""
    from PIL import Image

    from pretrain.data.decode import IMAGE_PARTS, decode_image

    name = next((name for name in IMAGE_PARTS if name in parts), None)
    if name is None:
        raise UserError("a sample has no image (jpg, png or webp)")
    image = decode_image(parts[name])
    height, width = image.shape[:2]
    side = size or min(height, width)
    if (height, width) == (side, side):
        return image
    scale = side / min(height, width)
    wide, high = max(side, round(width * scale)), max(side, round(height * scale))
    resized = Image.fromarray(image).resize((wide, high), Image.Resampling.BICUBIC)
    left, top = (wide - side) // 2, (high - side) // 2
    return np.asarray(resized.crop((left, top, left + side, top + side)))
