"""Crops against torchvision's antialiased resize: each of the three ways to make them."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import data as photographs
from torch import Tensor
from torchvision.transforms import functional as tv

from pretrain.data import crop

PHOTO = np.ascontiguousarray(photographs.astronaut()[40:300, 80:420])
HEIGHT, WIDTH = PHOTO.shape[:2]


def expected(box: tuple[int, int, int, int], size: int) -> Tensor:
    """Torchvision in float32, rounded."""
    image = torch.from_numpy(PHOTO).permute(2, 0, 1).float()
    top, left, height, width = box
    return tv.resize(tv.crop(image, top, left, height, width), [size, size], antialias=True).round()


@st.composite
def boxes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    height, width = draw(st.integers(1, HEIGHT)), draw(st.integers(1, WIDTH))
    return draw(st.integers(0, HEIGHT - height)), draw(st.integers(0, WIDTH - width)), height, width


@settings(max_examples=40)
@given(boxes(), st.integers(1, 100))
def test_crops_on_the_host_equal_torchvisions(box: tuple[int, int, int, int], size: int) -> None:
    """crop.cpp (where there is a compiler), and torch's uint8 kernel, which stands in for it."""
    views = crop.resized_many(PHOTO, [box], size)
    assert views.shape == (1, 3, size, size)
    for view in (views[0], crop.resized(PHOTO, box, size)):
        assert (torch.from_numpy(view).float() - expected(box, size)).abs().max() <= 1


@settings(max_examples=30)
@given(st.lists(boxes(), min_size=1, max_size=3), st.integers(1, 48))
def test_batched_crops_equal_torchvisions(chosen: list[tuple[int, int, int, int]], size: int) -> None:
    images = torch.from_numpy(PHOTO).permute(2, 0, 1).expand(len(chosen), -1, -1, -1)
    views = crop.resized_batch(images, torch.tensor(chosen), size)
    assert views.dtype == torch.uint8
    for view, box in zip(views, chosen):
        assert (view.float() - expected(box, size)).abs().max() <= 1


def test_a_crop_of_the_views_size_is_copied() -> None:
    for size in (32, 100):
        views = crop.resized_many(PHOTO, [(3, 5, size, size)], size)
        assert np.array_equal(views[0].transpose(1, 2, 0), PHOTO[3 : 3 + size, 5 : 5 + size])


def test_crops_of_a_part_of_an_image_and_of_many_images_at_once() -> None:
    images = [PHOTO[:50, :60], PHOTO[10:200], np.ascontiguousarray(PHOTO[:, :30])]
    chosen = np.array([(1, 2, 40, 50), (0, 0, 150, 300), (5, 0, 100, 30)])
    alone = [crop.resized_many(image, [box], 20)[0] for image, box in zip(images, chosen.tolist())]
    for view, image, box in zip(alone, images, chosen.tolist()):
        assert np.array_equal(view, crop.resized_many(np.ascontiguousarray(image), [box], 20)[0])
    library = crop.native()
    if library is not None:
        addresses = np.array([image.ctypes.data for image in images])
        strides = np.array([image.strides[0] for image in images])
        assert np.array_equal(crop.resized_at(library, addresses, strides, chosen, 20), np.stack(alone))


def test_rows_of_the_weights_sum_to_one_and_stay_in_the_box() -> None:
    weights = crop.weights(torch.tensor([3, 0]), torch.tensor([20, 7]), 40, 16)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 16))
    assert weights[0, :, :3].abs().max() == weights[0, :, 23:].abs().max() == weights[1, :, 7:].abs().max() == 0
