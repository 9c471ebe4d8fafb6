"""Corruptions against closed forms: what each does to flat, black, impulse and linear images is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from skimage import color, data, filters

from configs.errors import UserError
from downstream import blurs, corruptions, weather


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.ascontiguousarray(data.astronaut()[20:212, 130:322][::6, ::6])


def grey(value: int = 128) -> np.ndarray:
    return np.full((32, 32, 3), value, dtype=np.uint8)


def test_all_fifteen_are_there_and_are_functions_of_their_arguments(photo: np.ndarray) -> None:
    assert len(list(corruptions.every())) == 75
    for name, severity in corruptions.every():
        first = corruptions.corrupt(photo, name, severity, seed=1, index=7)
        assert first.shape == (32, 32, 3)
        assert first.dtype == np.uint8
        assert (first == corruptions.corrupt(photo, name, severity, seed=1, index=7)).all()
        assert (first != photo).any(), name


def test_random_ones_depend_on_the_index(photo: np.ndarray) -> None:
    steady = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
    for name in corruptions.NAMES:
        one, two = (corruptions.corrupt(photo, name, 3, seed=1, index=index) for index in (0, 1))
        assert (one == two).all() == (name in steady), name


def test_damage_grows_with_severity(photo: np.ndarray) -> None:
    for name in corruptions.NAMES:
        if name in ("elastic_transform", "glass_blur", "frost"):
            continue  # their constants are not ordered, or brighten and darken at once
        damage = [
            np.mean(
                [
                    np.abs(corruptions.corrupt(photo, name, severity, seed=0, index=index).astype(int) - photo).mean()
                    for index in range(8)
                ]
            )
            for severity in (1, 3, 5)
        ]
        assert damage[0] < damage[1] < damage[2], (name, damage)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gaussian_noise", (0.04, 0.06, 0.08, 0.09, 0.10)),
        ("shot_noise", tuple((0.5 / photons) ** 0.5 for photons in (500, 250, 100, 75, 50))),
        # Salt and pepper on grey .5: variance amount / 4.
        ("impulse_noise", tuple((amount / 4) ** 0.5 for amount in (0.01, 0.02, 0.03, 0.05, 0.07))),
    ],
)
def test_strength_of_noise(name: str, expected: tuple[float, ...]) -> None:
    for severity, spread in enumerate(expected, 1):
        images = [corruptions.corrupt(grey(), name, severity, seed=0, index=index) for index in range(12)]
        assert np.std(np.stack(images) / 255.0) == pytest.approx(spread, rel=0.05)


def test_flat_images_stay_flat_under_blurs() -> None:
    blurry = ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform", "pixelate", "contrast")
    for name in blurry:
        for severity in corruptions.SEVERITIES:
            after = corruptions.corrupt(grey(), name, severity, seed=0, index=0)
            assert np.abs(after.astype(int) - 128).max() <= 1, name


def test_contrast_and_brightness_formulas(photo: np.ndarray) -> None:
    x = photo / 255.0
    mean = x.mean((0, 1))
    after = corruptions.corrupt(photo, "contrast", 5, seed=0, index=0) / 255.0
    np.testing.assert_allclose(after, (x - mean) * 0.15 + mean, atol=1.01 / 255)
    hsv = color.rgb2hsv(x)
    hsv[..., 2] = np.clip(hsv[..., 2] + 0.2, 0, 1)
    after = corruptions.corrupt(photo, "brightness", 4, seed=0, index=0) / 255.0
    np.testing.assert_allclose(after, color.hsv2rgb(hsv), atol=1.01 / 255)
    assert (corruptions.corrupt(grey(0), "brightness", 3, seed=0, index=0) == int(0.15 * 255)).all()


def test_defocus_kernels() -> None:
    # Radius below 1: a single pixel softened by a 3 x 3 Gaussian. Radius 1.5: 3 x 3 pixels.
    edge = np.exp(-1 / (2 * 0.4**2)) / (1 + 2 * np.exp(-1 / (2 * 0.4**2)))
    assert blurs.disk(0.3, 0.4)[8, 7] == pytest.approx(edge * (1 - 2 * edge))
    for radius, softness in ((0.3, 0.4), (1.0, 0.2), (1.5, 0.1)):
        assert blurs.disk(radius, softness).sum() == pytest.approx(1)
    np.testing.assert_allclose(blurs.disk(1.5, 0.1)[7:10, 7:10], np.full((3, 3), 1 / 9), atol=1e-6)


def test_motion_blur_of_an_impulse_is_its_kernel() -> None:
    impulse = np.zeros((32, 32, 3))
    impulse[16, 16] = 1
    weights = np.exp(-(np.arange(13) ** 2) / (2 * 2.0**2))
    for angle, line in ((0.0, lambda tap: (16, 16 - tap)), (90.0, lambda tap: (16 - tap, 16))):
        after = blurs.motion_blur(impulse, 6, 2.0, angle)
        assert after.sum() == pytest.approx(3)
        for tap in range(13):
            assert after[line(tap)][0] == pytest.approx(weights[tap] / weights.sum())


def test_zoom_keeps_the_middle_and_enlarges_a_ramp() -> None:
    ramp = np.repeat(np.repeat(np.arange(32.0)[None, :, None], 32, axis=0), 3, axis=2)
    assert (blurs.clipped_zoom(ramp, 1.0) == ramp).all()
    zoomed = blurs.clipped_zoom(ramp, 1.25)
    slope = np.diff(zoomed[16, :, 0])
    assert zoomed.shape == (32, 32, 3)
    assert slope.mean() == pytest.approx(1 / 1.25, rel=0.05)


def test_gaussian_equals_scikit_image(photo: np.ndarray) -> None:
    x = photo / 255.0
    np.testing.assert_allclose(blurs.gaussian(x, 0.7), filters.gaussian(x, sigma=0.7, channel_axis=2), atol=1e-12)


def test_clouds_are_in_range_and_rougher_for_small_decay() -> None:
    smooth, rough = (weather.plasma(32, decay, np.random.default_rng(0)) for decay in (3.0, 1.75))
    for cloud in (smooth, rough):
        assert cloud.min() == 0
        assert cloud.max() == 1
    assert np.abs(np.diff(rough, axis=0)).mean() > np.abs(np.diff(smooth, axis=0)).mean()


def test_published_arrays_are_read_by_severity(tmp_path: Path) -> None:
    images = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "fog.npy", images)
    np.save(tmp_path / "labels.npy", np.arange(10) % 2)
    found, labels = corruptions.published(tmp_path, "fog", 3)
    assert found[:, 0, 0, 0].tolist() == [4, 5]
    assert labels.tolist() == [0, 1]
    with pytest.raises(UserError, match=r"snow\.npy is missing"):
        corruptions.published(tmp_path, "snow", 1)
    np.save(tmp_path / "frost.npy", images[:7])
    with pytest.raises(UserError, match="has shape"):
        corruptions.published(tmp_path, "frost", 1)
