"""Colour against torchvision's functional operations at equal parameters, natively and by torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms import functional as tv

from configs.schema import Views
from pretrain.data import colour, native, views
from pretrain.data.batch import Batch

MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)
STRONG = Views(size=20, flip=0.5, jitter=(0.8, 0.8, 0.8, 0.5), jitter_p=0.8, grey_p=0.2, blur_p=0.5)
OPERATIONS = {
    views.BRIGHTNESS: tv.adjust_brightness,
    views.CONTRAST: tv.adjust_contrast,
    views.SATURATION: tv.adjust_saturation,
    views.HUE: tv.adjust_hue,
}


def expected(image: Tensor, params: np.ndarray, blur_size: int) -> Tensor:
    """Torchvision's operations one after another on one float image."""
    image = image.float() / 255
    if params[views.FLIP]:
        image = tv.hflip(image)
    for column in views.ORDERS[int(params[views.ORDER])] if params[views.ORDER] >= 0 else ():
        image = OPERATIONS[column](image, float(params[column]))
    if params[views.GREY]:
        image = tv.rgb_to_grayscale(image, 3)
    if params[views.SIGMA]:
        image = tv.gaussian_blur(image, [blur_size, blur_size], [float(params[views.SIGMA])] * 2)
    return tv.normalize(image, list(MEAN), list(STD))


def make_images(count: int, side: int) -> Tensor:
    """Noise, and the corners of the colour space: grey, black, white, pure colours, ties between channels."""
    images = torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images[0], images[1], images[2] = 0, 255, 128
    images[3, 0], images[3, 1:] = 255, 0
    images[4, 1] = images[4, 0]
    images[5, 2] = images[5, 1]
    return images


@pytest.mark.parametrize("path", ["torch", "native"])
@pytest.mark.parametrize("side", [20, 33])
def test_every_view_equals_torchvisions(path: str, side: int) -> None:
    section = STRONG.model_copy(update={"size": side})
    augment = colour.Colour(section, MEAN, STD)
    images = make_images(80, side)
    params = views.colour_params(section, 0, 0, np.arange(80), 0)
    if path == "torch":
        result = augment._apply_torch(images, params)
    else:
        library = native.library(Path(colour.__file__).with_name("colour.cpp"))
        if library is None:
            pytest.skip("no C++ compiler")
        result = augment._apply_native(library, images, params)
    for image, row, ours in zip(images, params, result):
        torch.testing.assert_close(ours, expected(image, row, augment.blur_size), atol=3e-5, rtol=0)


@pytest.mark.parametrize("column", list(OPERATIONS))
def test_each_operation_alone(column: int) -> None:
    images = make_images(12, 8).float() / 255
    factors = torch.linspace(-0.5, 0.5, 12) if column == views.HUE else torch.linspace(0, 2, 12)
    if column == views.HUE:
        ours = colour.hue(images, factors)
    else:
        ours = colour.blend(images, factors, torch.full((12,), column))
    for image, factor, view in zip(images, factors, ours):
        torch.testing.assert_close(view, OPERATIONS[column](image, factor.item()), atol=1e-5, rtol=0)


def make_batch(images: Tensor) -> Batch:
    places = torch.arange(len(images))
    return Batch({"images": images}, samples=places * 7, epochs=places % 3, positions=places, seed=5)


def test_a_chunk_of_a_batch_is_coloured_as_in_the_batch() -> None:
    """Micro-batches and ranks change nothing: parameters follow the samples."""
    batch = make_batch(make_images(40, 20).view(20, 2, 3, 20, 20))
    augment = colour.Colour(STRONG, MEAN, STD)
    whole = augment(batch)
    assert whole.shape == (20, 2, 3, 20, 20)
    assert torch.equal(torch.cat([augment(batch[:3]), augment(batch[3:11]), augment(batch[11:])]), whole)


def test_without_jitter_views_are_only_normalised() -> None:
    section = Views(size=20, jitter=(0.0, 0.0, 0.0, 0.0), grey_p=0.0)
    images = make_images(6, 20).view(3, 2, 3, 20, 20)
    result = colour.Colour(section, (0.5,) * 3, (0.5,) * 3)(make_batch(images))
    torch.testing.assert_close(result, images.float() / 127.5 - 1, atol=1e-6, rtol=0)


def test_without_a_compiler_views_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(make_images(20, 20).view(10, 2, 3, 20, 20))
    augment = colour.Colour(STRONG, MEAN, STD)
    first = augment(batch)
    monkeypatch.setattr(colour, "library", lambda source: None)
    torch.testing.assert_close(augment(batch), first, atol=3e-5, rtol=0)


def test_on_a_gpu_everything_is_on_the_gpu() -> None:
    """With fake CUDA tensors: nothing is left on the host, and no value is asked for there (a device sync)."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.empty(10, 2, 3, 20, 20, dtype=torch.uint8, device="cuda")
        params = views.colour_params(STRONG, 5, 0, np.arange(20), 0)
        result = colour.Colour(STRONG, MEAN, STD).apply(images.flatten(0, 1), params)
    assert result.device.type == "cuda"
    assert result.shape == (20, 3, 20, 20)
