"""Segments of one picture of the user's own.

Owns: reading it, and the picture that is written: the photo beside its tinted segments.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from configs import ObjectDiscoveryConfig, UserError
from configs.presets import Preset
from downstream import discovery, pictures
from downstream.backbone import load
from downstream.grouping import enlarge
from downstream.samples import centre_crop, to_float
from pretrain.data.decode import BrokenImageError, decode_image


def segment_picture(config: ObjectDiscoveryConfig, out: Path) -> dict[str, Any]:
    """Segment one picture of the user's; writes NAME_segments.png beside the other results.

    Raises:
        UserError: the picture cannot be read, or one is not enough for the method.
    """
    assert config.ckpt is not None
    assert config.image is not None
    if config.method == "codebook":
        raise UserError("method=codebook learns from a whole data set: one picture needs another method")
    try:
        photo = to_float(decode_image(Path(config.image).read_bytes()))
    except (OSError, BrokenImageError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{config.image} cannot be read as a picture: {reason}") from error
    preset = discovery.preset_of(config) if config.preset else Preset(config.size or 256, config.k or 4)
    size = config.size or config.input_size or preset.size
    encoder = load(
        config.ckpt, arch=config.arch, args=config.args, img_size=size, steps=config.steps, layer=config.layer,
        device=config.device, precision=config.precision, seed=config.seed,
    )  # fmt: skip
    image = centre_crop(photo, resize=size, size=size)
    protocol = discovery.protocol_of(config, preset)
    cut = discovery.segments(encoder, image[None], protocol)[0]
    labels = enlarge(cut, (size, size))[0]
    path = out / f"{Path(config.image).stem}_segments.png"
    _write_pair(path, image, torch.from_numpy(pictures.overlay(image, labels)))
    counts = torch.bincount(labels.flatten()).tolist()
    print(
        f"{len(counts)} segments, of {min(counts) / labels.numel():.0%} to {max(counts) / labels.numel():.0%}: {path}"
    )
    return {"picture": str(path), "segments": len(counts)}


def _write_pair(path: Path, image: Tensor, tinted: Tensor) -> None:
    photo = (image * 255).byte().permute(1, 2, 0).numpy()
    pair = Image.fromarray(np.concatenate([photo, tinted.numpy()], axis=1))
    path.parent.mkdir(parents=True, exist_ok=True)
    scale = max(1, 512 // photo.shape[0])
    pair.resize((pair.width * scale, pair.height * scale), Image.Resampling.NEAREST).save(path)
