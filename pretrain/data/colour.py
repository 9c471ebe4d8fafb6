"""The colour of views, batched on the device: flip, jitter, grey, blur, normalisation.

Equal to torchvision's operations (`torchvision.transforms.functional` on float images) at equal parameters, up to float
rounding; the parameters are drawn on the host (views.py). On CPU, colour.cpp runs a view's operations while it stays in
a core's cache. Elsewhere all views go through the places of their orders together, and each takes the operation that
is its own there: more arithmetic, and few passes over memory once fused.

Hue in closed form, equal to RGB -> HSV -> shift -> RGB: with M the largest channel, chroma c = M - min and hue h in
sixths, channel k is M - c * clamp(min(x, 4 - x), 0, 1), x = (n_k + h) mod 6, n = 5, 3, 1 for red, green, blue.

Shapes: b samples, V views, m views, S side, P colour parameters.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from configs.schema import Views
from pretrain.blocks import kept
from pretrain.data import views as v
from pretrain.data.native import library
from pretrain.fusing import fused_on_gpu

if TYPE_CHECKING:
    from pretrain.data.batch import Batch

LUMA = (0.2989, 0.587, 0.114)  # torchvision's

# Pixels (times channels) per block on CPU: a block of float32 and its temporaries fit in 2 MB.
BLOCK = 3 * 1 << 15


def grey(images: Tensor) -> Tensor:
    """Luma [m, 1, S, S] of images [m, 3, S, S]."""
    red, green, blue = images.unbind(1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue).unsqueeze(1)


def _per_image(factor: Tensor) -> Tensor:
    return factor.view(-1, 1, 1, 1)


def blend(images: Tensor, factor: Tensor, column: Tensor) -> Tensor:
    """Brightness, contrast or saturation, as `column` [m] says for each of the images [m, 3, S, S], by factor [m].

    All three blend with something: black, the mean luma of the image, the luma of the pixel.
    """
    luma, column, factor = grey(images), _per_image(column), _per_image(factor)
    mean = luma.mean((1, 2, 3), keepdim=True)
    other = torch.where(column == v.CONTRAST, mean, torch.where(column == v.SATURATION, luma, 0.0))
    return (factor * images + (1 - factor) * other).clamp(0, 1)


def hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of [m, 3, S, S] by shift [m], as a share of the circle."""
    red, green, blue = images.unbind(1)
    most = torch.maximum(torch.maximum(red, green), blue)
    chroma = most - torch.minimum(torch.minimum(red, green), blue)
    scale = 1 / torch.where(chroma > 0, chroma, 1.0)
    # Hue in sixths of the circle, from the channel that is largest (red before green before blue, as torchvision).
    from_red, from_green, from_blue = (green - blue) * scale, (blue - red) * scale + 2, (red - green) * scale + 4
    angle = torch.where(most == red, from_red, torch.where(most == green, from_green, from_blue))
    angle = angle + 6 * shift.view(-1, 1, 1)
    places = [(angle + place).remainder(6) for place in (5, 3, 1)]
    return torch.stack([most - torch.minimum(x, 4 - x).clamp(0, 1) * chroma for x in places], 1)


def blur(images: Tensor, sigma: Tensor, size: int) -> Tensor:
    """Gaussian blur of [m, 3, S, S] with sigma [m] in pixels and an odd kernel of `size`, borders reflected."""
    offsets = torch.arange(size, device=images.device, dtype=images.dtype) - (size - 1) / 2
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]).square())
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)  # [m * 3, size]
    side, pad = images.shape[-1], size // 2
    flat = F.pad(images, (pad, pad, pad, pad), mode="reflect").flatten(0, 1).unsqueeze(0)
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=len(kernel))
    return F.conv2d(flat, kernel[:, None, None, :], groups=len(kernel)).view(-1, 3, side, side)


@fused_on_gpu
def coloured(
    images: Tensor, params: Tensor, columns: Tensor, scale: Tensor, offset: Tensor, blur_size: int, hues: bool
) -> Tensor:  # fmt: skip
    """uint8 [m, 3, S, S] -> float32 of the same shape, augmented and normalised.

    Args:
        params: [m, P].
        columns: int64 [m, places]: which column of `params` is applied at each place, -1 for none.
        scale, offset: [3, 1, 1], 1 / std and mean / std.
        blur_size: of the kernel in pixels; 0: no blur.
        hues: whether any column is the hue.
    """
    x = images.to(torch.float32) / 255
    x = torch.where(_per_image(params[:, v.FLIP]) > 0, x.flip(-1), x)
    for column in columns.unbind(1):
        factor = torch.where(column >= 0, params.gather(1, column.clamp(min=0)[:, None])[:, 0], 1.0)
        is_hue = column == v.HUE
        blended = blend(x, torch.where(is_hue, 1.0, factor), column)
        x = torch.where(_per_image(is_hue), hue(x, factor), blended) if hues else blended
    x = torch.where(_per_image(params[:, v.GREY]) > 0, grey(x), x)
    if blur_size:
        sigma = params[:, v.SIGMA]
        x = torch.where(_per_image(sigma) > 0, blur(x, sigma.clamp(min=1e-3), blur_size), x)
    return x * scale - offset


class Colour:
    """Colour augmentation and normalisation of the views of a batch.

    Args:
        views: their distribution; strengths of 0 are skipped.
        mean, std: of the model's input, per channel, for images in [0, 1].
    """

    def __init__(self, views: Views, mean: Sequence[float], std: Sequence[float]) -> None:
        columns = (v.BRIGHTNESS, v.CONTRAST, v.SATURATION, v.HUE)
        self.active = {column for column, strength in zip(columns, views.jitter) if strength > 0 and views.jitter_p > 0}
        # What is applied at each place of an order; the last row, for order -1: nothing.
        rows = [[column for column in order if column in self.active] for order in v.ORDERS]
        self._table = np.array([*rows, [-1] * len(self.active)], np.int64)
        # SimCLR: a kernel of a tenth of the side, odd.
        self.blur_size = int(0.1 * views.size) // 2 * 2 + 1 if views.blur_p > 0 else 0
        self.views = views
        self.mean, self.std = np.array(mean, np.float32), np.array(std, np.float32)
        self._normalisations: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """The tensor "images" uint8 [b, V, 3, S, S] of a batch -> float32 [b, V, 3, S, S] on the same device."""
        images = batch.tensors["images"]
        epochs, samples = batch.epochs.numpy()[:, None], batch.samples.numpy()[:, None]
        params = v.colour_params(self.views, batch.seed, epochs, samples, np.arange(images.shape[1]))
        return self.apply(images.flatten(0, 1), params.reshape(-1, v.NUM_COLOUR)).view(images.shape)

    def apply(self, images: Tensor, params: np.ndarray) -> Tensor:
        """uint8 [m, 3, S, S] and parameters float32 [m, P] -> float32 [m, 3, S, S] on the device of the images."""
        if images.device.type == "cpu" and (native := library(Path(__file__).with_name("colour.cpp"))) is not None:
            return self._apply_native(native, images.contiguous(), params)
        return self._apply_torch(images, params)

    def _apply_native(self, native: ctypes.CDLL, images: Tensor, host: np.ndarray) -> Tensor:
        """By colour.cpp, a part of the views in each of torch's threads."""
        params = torch.from_numpy(np.ascontiguousarray(host))
        result = kept.empty(tuple(images.shape), torch.float32)
        active = [[column if column in self.active else -1 for column in order] for order in v.ORDERS]
        orders = torch.tensor(active, dtype=torch.int32)
        scale, offset = self._normalisation(images.device)

        def run(part: slice) -> None:
            views, out, chosen = images[part], result[part], params[part]
            pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (views, out, chosen, orders, scale, offset)]
            sizes = [ctypes.c_int64(n) for n in (len(views), images.shape[-1], self.blur_size)]
            native.colour(*pointers[:4], *sizes, *pointers[4:])

        threads = min(torch.get_num_threads(), len(images))
        bounds = [len(images) * t // max(1, threads) for t in range(threads + 1)]
        parts = [slice(*bound) for bound in pairwise(bounds)]
        workers = [Thread(target=run, args=(part,)) for part in parts[1:]]
        for worker in workers:
            worker.start()
        for part in parts[:1]:
            run(part)
        for worker in workers:
            worker.join()
        return result

    def _apply_torch(self, images: Tensor, host: np.ndarray) -> Tensor:
        """By torch's operations, on any device. What is to be done is known on the host: no device sync."""
        device = images.device
        params = torch.from_numpy(host).to(device, non_blocking=True)
        columns = torch.from_numpy(self._table[host[:, v.ORDER].astype(np.int64)]).to(device, non_blocking=True)
        scale, offset = self._normalisation(device)
        most = max(1, BLOCK // images.shape[1:].numel()) if device.type == "cpu" else max(1, len(images))
        parts = zip(images.split(most), params.split(most), columns.split(most))
        done = [coloured(*part, scale, offset, self.blur_size, v.HUE in self.active) for part in parts]
        return done[0] if len(done) == 1 else torch.cat(done)

    def _normalisation(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(1 / std, mean / std) as [3, 1, 1], copied to a device once."""
        if device not in self._normalisations:
            scale, offset = (torch.from_numpy(values).view(3, 1, 1) for values in (1 / self.std, self.mean / self.std))
            self._normalisations[device] = scale.to(device), offset.to(device)
        return self._normalisations[device]
