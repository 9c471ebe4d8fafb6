"""CLEVR-like scenes: places and shadows by geometry, pictures where pybullet is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from test_sources import request

from configs.errors import UserError
from pretrain.data.decode import decode_image, decode_mask
from pretrain.data.sources import clevr_scenes
from pretrain.data.sources.clevr_scenes import FLOOR, GAP, Item, arrange, shadows
from pretrain.data.sources.sample import Sample

INSTALLED = importlib.util.find_spec("pybullet") is not None


def test_objects_stand_apart_on_the_floor() -> None:
    draws = np.random.default_rng(0).random((200, 10, clevr_scenes.PER_OBJECT))
    placed = [items for draw in draws if (items := arrange(draw, 6)) is not None]
    assert len(placed) > 150
    for items in placed:
        assert len(items) == 6
        for at, item in enumerate(items):
            assert max(abs(item.x), abs(item.y)) <= FLOOR
            assert all(np.hypot(item.x - o.x, item.y - o.y) > item.radius + o.radius + GAP for o in items[:at])


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_shadows_have_the_area_that_geometry_gives(kind: int) -> None:
    """Seen from far above, the floor is a map; the light stands at 45 degrees. Own place and shadow are one region."""
    r, height = 0.7, 200.0
    eye = np.array([0.0, -1e-3, height])
    side = 2 * height * np.tan(np.radians(clevr_scenes.FIELD) / 2) / clevr_scenes.SIZE
    scale = 0.05 / side  # 128 pixels would span 137 units from here: look more closely by scaling the object
    large = Item(kind, r / scale, 0.0, 0.0, 0.0, np.zeros(3), 0.0)
    area = shadows([large], eye, np.array([1.0, 0.0, 1.0])).sum() * side**2 * scale**2
    expected = {
        0: 2 * (2 * (r / np.sqrt(2)) ** 2) * 2,  # square of side s, moved by s: s * 2 s
        1: np.pi * r**2 * np.sqrt(2),  # an ellipse: r across, r * sqrt(2) along
        2: np.pi * r**2 + 2 * r * 2 * r,  # a disc moved by 2 r
    }[kind]
    assert area == pytest.approx(expected, rel=0.06)


@pytest.mark.skipif(INSTALLED, reason="pybullet is installed")
def test_without_pybullet_the_remedy_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pip install pybullet"):
        clevr_scenes.open_source("clevr-scenes", request(tmp_path, tmp_path))


@pytest.mark.skipif(not INSTALLED, reason="pybullet is not installed")
def test_every_object_is_seen_and_scenes_depend_on_their_number(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = clevr_scenes.open_source("clevr-scenes", request(tmp_path, tmp_path, count=5))[""]
    whole = list(source.read(np.arange(5)))
    (again,) = source.read(np.array([3]))
    assert again == whole[3]
    assert capfd.readouterr() == ("", "")
    for sample in whole:
        assert isinstance(sample, Sample)
        labels = decode_mask(sample.parts["instances.png"])
        image = decode_image(sample.parts["png"])
        assert image.shape == (128, 128, 3)
        counts = np.bincount(labels.reshape(-1))
        assert 3 <= len(counts) - 1 <= 6
        assert counts[1:].min() >= clevr_scenes.VISIBLE
        floor = image[labels == 0].reshape(-1, 3).astype(int)
        assert np.abs(floor - floor.mean(axis=1, keepdims=True)).max() < 3, "the floor is grey, lit or in shadow"
