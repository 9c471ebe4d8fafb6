"""Views: boxes and colour parameters have torchvision's distributions, and are functions of the sample's key alone."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from torchvision import transforms

from configs.schema import Views
from pretrain.data import counter, decode, views

COUNT = 4000


@given(st.floats(-3, 3))
def test_exp_is_exp(x: float) -> None:
    assert views.exp(x) == pytest.approx(math.exp(x), rel=1e-14)


@given(
    st.integers(0, 2**64 - 1),
    st.integers(1, 700),
    st.integers(1, 700),
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(lambda pair: (min(pair), max(pair))),
)
def test_boxes_are_equal_one_by_one_and_vectorised(
    key: int, height: int, width: int, scale: tuple[float, float]
) -> None:
    crops = views.CropRange(scale, (3 / 4, 4 / 3))
    draws = crops.draws(np.array([key], np.uint64))
    box = crops.box(draws[0].tolist(), height, width)
    assert crops.boxes(draws, np.array([height]), np.array([width]))[0].tolist() == list(box)
    top, left, h, w = box
    assert 0 <= top <= top + h <= height
    assert 0 <= left <= left + w <= width
    assert min(h, w) >= 1


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 120)])
def test_boxes_are_distributed_as_torchvisions(height: int, width: int) -> None:
    """Areas, aspects and places against RandomResizedCrop.get_params, by two-sample Kolmogorov-Smirnov tests."""
    torch.manual_seed(0)
    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    image = torch.empty(3, height, width)
    draw = transforms.RandomResizedCrop.get_params
    theirs = np.array([draw(image, list(scale), list(ratio)) for _ in range(COUNT)])
    keys = counter.key(0, 0, np.arange(COUNT), 0, "crop")
    crops = views.CropRange(scale, ratio)
    ours = crops.boxes(crops.draws(keys), np.full(COUNT, height), np.full(COUNT, width))
    for statistic in (
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 3] / box[:, 2],
        lambda box: box[:, 0] / np.maximum(1, height - box[:, 2]),
        lambda box: box[:, 1] / np.maximum(1, width - box[:, 3]),
        lambda box: box[:, 2],
    ):
        assert stats.ks_2samp(statistic(ours), statistic(theirs)).pvalue > 1e-3


def test_boxes_fall_back_to_torchvisions_central_crop() -> None:
    """Images so long that no draw fits."""
    torch.manual_seed(0)
    for height, width in ((10, 2000), (2000, 10)):
        expected = transforms.RandomResizedCrop.get_params(torch.empty(3, height, width), [0.9, 1.0], [3 / 4, 4 / 3])
        crops = views.CropRange((0.9, 1.0), (3 / 4, 4 / 3))
        assert crops.box(crops.draws(np.array([5], np.uint64))[0].tolist(), height, width) == tuple(expected)


def test_colour_parameters_are_distributed_as_torchvisions() -> None:
    torch.manual_seed(0)
    section = Views(size=32, jitter=(0.4, 1.2, 0.3, 0.1), jitter_p=0.7, grey_p=0.2, flip=0.4, blur_p=0.5)
    params = views.colour_params(section, 0, 3, np.arange(COUNT), 1).astype(float)
    jitter = transforms.ColorJitter(*section.jitter)
    theirs = [
        transforms.ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        for _ in range(COUNT)
    ]
    jittered = params[params[:, views.ORDER] >= 0]
    for column, place in ((views.BRIGHTNESS, 1), (views.CONTRAST, 2), (views.SATURATION, 3), (views.HUE, 4)):
        assert stats.ks_2samp(jittered[:, column], [draw[place] for draw in theirs]).pvalue > 1e-3
    for share, count in (
        (0.7, len(jittered)),
        (0.2, params[:, views.GREY].sum()),
        (0.4, params[:, views.FLIP].sum()),
        (0.5, (params[:, views.SIGMA] > 0).sum()),
    ):
        assert stats.binomtest(int(count), COUNT, share).pvalue > 1e-3
    orders = np.unique(jittered[:, views.ORDER], return_counts=True)[1]
    assert len(orders) == 24
    assert stats.chisquare(orders).pvalue > 1e-3
    blurred = params[params[:, views.SIGMA] > 0, views.SIGMA]
    assert stats.kstest(blurred, stats.uniform(0.1, 1.9).cdf).pvalue > 1e-3
    columns = [views.BRIGHTNESS, views.CONTRAST, views.SATURATION, views.HUE]
    assert np.abs(np.corrcoef(jittered[:, columns].T) - np.eye(4)).max() < 0.06


def test_parameters_depend_on_seed_epoch_sample_and_view() -> None:
    section = Views(size=32)
    base = views.colour_params(section, 1, 2, 3, 0)
    assert np.array_equal(base, views.colour_params(section, 1, np.array([9, 2]), np.array([9, 3]), 0)[1])
    for other in ((2, 2, 3, 0), (1, 3, 3, 0), (1, 2, 4, 0), (1, 2, 3, 1)):
        assert not np.array_equal(base, views.colour_params(section, *other))


def test_transform_is_pure_and_its_views_are_the_crops() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    transform = views.SimclrTransform(Views(size=24), seed=4)
    draws = transform.draws(np.array([0, 1]), np.array([3, 7]))[1]
    images = transform({"png": stream.getvalue()}, draws)()["images"]
    assert images.shape == (2, 3, 24, 24)
    assert np.array_equal(images, transform({"image": image, "cls": b"3"}, draws)()["images"])
    for view in range(2):
        key = np.array([counter.key_int(4, 1, 7, view, "crop")], np.uint64)
        top, left, height, width = transform.crops.box(transform.crops.draws(key)[0].tolist(), 60, 80)
        part = torch.from_numpy(image[top : top + height, left : left + width]).permute(2, 0, 1)
        expected = transforms.functional.resize(part, [24, 24], antialias=True)
        assert (torch.from_numpy(images[view]).int() - expected.int()).abs().max() <= 1


def test_transform_without_an_image_says_so() -> None:
    with pytest.raises(decode.BrokenImageError, match="no image among its parts"):
        views.SimclrTransform(Views(size=24), seed=4)({"txt": b"", "cls": b"1"}, np.zeros((2, 22)))
