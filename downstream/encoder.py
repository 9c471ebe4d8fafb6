"""One contract for every backbone: images in [0, 1] -> pooled features and a map. Evaluation never asks which it has.

Owns: the size a model sees images at, which of its layers is taken, the start of its oscillators, and the controls that
change a model without training it.

B images, D channels of the features, h x w tokens.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, is_dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.oscillators import OscillatorOutput

Control = Literal["random", "uncoupled", "no_steps"]


@dataclass(frozen=True)
class Features:
    """Attributes: pooled [B, D'], map [B, D, h, w], both float32; oscillators [B, C, h, w] where asked for."""

    pooled: Tensor
    map: Tensor
    oscillators: Tensor | None = None


class Encoder:
    """A frozen backbone in evaluation mode.

    Args:
        model: a timm model without classifier, or one that behaves like it.
        name: how tables call it.
        side: side in pixels that images are resized to before the model sees them; None: as they come.
        layer: "readout" (the last map), "oscillators" (the state before the last readout) or a timm feature level.
        precision: "bf16" runs matrix products in bfloat16.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        side: int | None = None,
        layer: str = "readout",
        device: torch.device | str = "cpu",
        precision: str = "fp32",
    ) -> None:
        network: Any = model.eval().requires_grad_(False).to(device)
        self.model = network
        for module in network.modules():  # up to twice as fast with channels last, on CPUs and GPUs
            if isinstance(module, nn.Conv2d) and not self.has_oscillators:
                module.to(memory_format=torch.channels_last)
        self.name, self.layer, self.device, self.precision = name, layer, torch.device(device), precision
        self.patch = _pixels_per_token(self.model, layer)
        self.side = None if side is None else max(1, round(side / self.patch)) * self.patch
        config: dict[str, Any] = self.model.pretrained_cfg
        self._mean = torch.tensor(config["mean"], device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor(config["std"], device=self.device).view(1, 3, 1, 1)

    @property
    def has_oscillators(self) -> bool:
        """Whether features depend on random starts."""
        return hasattr(self.model, "draw_start")

    @torch.inference_mode()
    def encode(self, images: Tensor, *, start_seed: int = 0, oscillators: bool = False) -> Features:
        """Features of images [B, 3, H, W] in [0, 1].

        One start of the oscillators, drawn from `start_seed`, is shared by the batch: the features of an image do not
        depend on the images beside it.
        """
        images = self._prepare(images)
        options = self._start(images, start_seed)
        with self._autocast():
            if self.layer == "readout" and not oscillators:
                final = self.model.forward_features(images, **options)
                features, state = self._as_map(final, images), None
                pooled = self.model.forward_head(final, pre_logits=True)
            else:
                levels = [self.level(self.layer)] + ([self.level("oscillators")] if oscillators else [])
                final, maps = self.model.forward_intermediates(
                    images, indices=sorted(set(levels)), norm=True, **options
                )
                of = dict(zip(sorted(set(levels)), maps))
                features, state = of[levels[0]], of[levels[1]] if oscillators else None
                pooled = self._pool(features, final)
        return Features(pooled.float(), features.float(), None if state is None else state.float())

    def energy(self, images: Tensor, *, start_seed: int = 0) -> Tensor:
        """Energy of each image after the last step of the last layer, [B]; lower means more agreement."""
        return self.oscillations(images, start_seed=start_seed).energy[-1][-1].float()

    @torch.inference_mode()
    def oscillations(self, images: Tensor, *, start_seed: int = 0, trajectory: bool = False) -> OscillatorOutput:
        """What one forward pass goes through: oscillators and energies of all layers, their trajectories if wanted."""
        images = self._prepare(images)
        options = self._start(images, start_seed)
        with self._autocast():
            output: OscillatorOutput = self.model.forward_oscillators(
                images, energy=True, trajectory=trajectory, **options
            )
        return output

    def digest(self) -> str:
        """Hexadecimal digest of weights, architecture, layer and size: what the features of an image depend on."""
        summary = hashlib.sha256()
        for key, value in sorted(self.model.state_dict().items()):
            summary.update(key.encode())
            summary.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for module in self.model.modules():  # steps, step size, norms, ...: not all that counts is a tensor
            summary.update(f"{type(module).__name__} {sorted(_settings(module).items())}".encode())
        summary.update(f"{self.layer} {self.side} {self.precision} {self._mean.tolist()} {self._std.tolist()}".encode())
        return summary.hexdigest()[:16]

    def resize(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] at the size that the model sees."""
        if self.side is None or images.shape[-2:] == (self.side, self.side):
            return images
        return F.interpolate(images, size=(self.side, self.side), mode="bicubic", antialias=True).clamp(0, 1)

    def _prepare(self, images: Tensor) -> Tensor:
        return (self.resize(images.to(self.device, non_blocking=True)) - self._mean) / self._std

    def _start(self, images: Tensor, seed: int) -> dict[str, Tensor]:
        if not self.has_oscillators:
            return {}
        return {"start": self.model.draw_start(seed, img_size=tuple(images.shape[-2:])).to(self.device)}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def level(self, layer: str) -> int:
        """Number of a feature level, counted from the first.

        Raises:
            ValueError: the model has no such level.
        """
        count = len(self.model.feature_info)
        if layer == "readout":
            return count - 1
        if layer == "oscillators":
            if not self.has_oscillators:
                raise ValueError(
                    f"{self.name} has no oscillators: layer must be readout or a level from 0 to {count - 1}"
                )
            return count - 2
        level = int(layer) if layer.lstrip("-").isdigit() else count
        if not -count <= level < count:
            raise ValueError(
                f"layer {layer!r} of {self.name}: give readout, oscillators or a level from 0 to {count - 1}"
            )
        return level % count

    def _as_map(self, final: Tensor, images: Tensor) -> Tensor:
        """What `forward_features` gives, as [B, D, h, w].

        Raises:
            ValueError: it is no map, nor tokens of one.
        """
        if not isinstance(final, Tensor):
            raise ValueError("its features are several maps")
        if final.ndim == 4:
            return final.permute(0, 3, 1, 2) if getattr(self.model, "output_fmt", "") == "NHWC" else final
        tokens = final[:, getattr(self.model, "num_prefix_tokens", 0) :]
        height = max(1, round(math.sqrt(tokens.shape[1] * images.shape[2] / images.shape[3])))
        return tokens.mT.unflatten(2, (height, -1))

    def _pool(self, features: Tensor, final: Tensor) -> Tensor:
        if self.layer == "readout":
            return self.model.forward_head(final, pre_logits=True)
        pool = F.adaptive_max_pool2d if getattr(self.model, "global_pool", "avg") == "max" else F.adaptive_avg_pool2d
        return pool(features, 1).flatten(1)


def _settings(module: nn.Module) -> dict[str, str]:
    """The plain values that a module holds by name: numbers, words, and dataclasses of these."""
    return {
        name: repr(value)
        for name, value in vars(module).items()
        if not name.startswith("_") and (isinstance(value, int | float | str) or is_dataclass(value))
    }


def apply_control(encoder: Encoder, control: Control) -> None:
    """Turn a model into its control: `uncoupled` J = 0, `no_steps` T = 0 (`random` is chosen when loading).

    Raises:
        ValueError: the model has no oscillators.
    """
    if control == "random":
        return
    if not encoder.has_oscillators:
        raise ValueError(f"control {control} needs a model with oscillators, which {encoder.name} is not")
    if control == "no_steps":
        encoder.model.set_steps(0)
        return
    from pretrain.models.connectivity import Coupling

    for module in encoder.model.modules():
        if isinstance(getattr(module, "coupling", None), Coupling):
            module.coupling = Coupling()


def _pixels_per_token(model: Any, layer: str) -> int:
    """Side of a token in pixels: the model's patch, or the stride of the layer."""
    info = model.feature_info
    level = int(layer) if layer.lstrip("-").isdigit() and -len(info) <= int(layer) < len(info) else -1
    return int(info[level]["reduction"])
