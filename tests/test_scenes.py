"""Generated scenes: exact masks, distributions, and that a scene is a pure function of its number."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from pretrain.data.scenes import SCENES
from pretrain.data.scenes.dsprites import MOST
from pretrain.data.scenes.shapes import OUTLINES
from pretrain.data.scenes.tetrominoes import COLOURS, UNIT, fixed_tetrominoes, masks
from pretrain.make_shards import KINDS

NUMBERS = np.arange(160)


def colours(pixels: np.ndarray) -> int:
    """How many different colours: uint8 [n, 3] -> count."""
    return len(np.unique(pixels.astype(np.int64) @ [65536, 256, 1]))


@pytest.mark.parametrize("name", SCENES)
def test_a_scene_depends_on_its_seed_and_number_only(name: str) -> None:
    images, labels = SCENES[name](3, NUMBERS[:40])
    some = np.array([17, 5, 39])
    alone, alone_labels = SCENES[name](3, some)
    np.testing.assert_array_equal(alone, images[some])
    np.testing.assert_array_equal(alone_labels, labels[some])
    assert images.dtype == labels.dtype == np.uint8
    assert images.shape == (*labels.shape, 3)
    assert (SCENES[name](4, NUMBERS[:40])[1] != labels).any()
    assert len(np.unique(images.reshape(40, -1), axis=0)) == 40


def test_every_scene_is_a_source() -> None:
    assert set(SCENES) == {name for name, kind in KINDS.items() if kind.module == "generated"}


def test_there_are_nineteen_fixed_tetrominoes() -> None:
    shapes = fixed_tetrominoes()
    assert len({(shape.shape, shape.tobytes()) for shape in shapes}) == len(shapes) == 19
    for shape in shapes:
        assert shape.sum() == 4
        assert ndimage.label(shape)[1] == 1


def test_tetrominoes_are_whole_pieces_without_overlap() -> None:
    """Before the cut each object is four unit squares that form one of the 19, drawn evenly."""
    seen = np.zeros(19)
    shapes = fixed_tetrominoes()
    for mask in masks(0, NUMBERS):
        for label in (1, 2, 3):
            ys, xs = np.nonzero(mask == label)
            piece = mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1] == label
            assert piece.sum() == 4 * UNIT**2
            units = piece[::UNIT, ::UNIT]
            np.testing.assert_array_equal(np.kron(units, np.ones((UNIT, UNIT), bool)), piece)
            seen[next(i for i, s in enumerate(shapes) if s.shape == units.shape and (s == units).all())] += 1
    assert seen.min() > 0.3 * seen.mean()


def test_tetromino_variants_share_their_masks_and_differ_in_colour() -> None:
    coloured, labels = SCENES["tetrominoes"](0, NUMBERS)
    one, one_labels = SCENES["tetrominoes-one-colour"](0, NUMBERS)
    white, white_labels = SCENES["tetrominoes-white"](0, NUMBERS)
    np.testing.assert_array_equal(labels, one_labels)
    np.testing.assert_array_equal(labels, white_labels)
    assert coloured.shape == (160, 32, 32, 3)
    for images in (coloured, one, white):
        assert (images[labels == 0] == 0).all()
    assert (white[labels > 0] == 255).all()
    assert {tuple(colour) for colour in coloured[labels > 0].tolist()} == {tuple(colour) for colour in COLOURS.tolist()}
    for image, mask in zip(coloured, labels):
        assert all(colours(image[mask == label]) == 1 for label in (1, 2, 3))
    assert all(colours(image[mask > 0]) == 1 for image, mask in zip(one, labels))
    assert np.bincount(labels.reshape(-1), minlength=4)[1:].min() > 0


def test_sprites_keep_their_colour_and_their_numbers_close_up() -> None:
    images, labels = SCENES["multi-dsprites"](0, NUMBERS)
    counts = []
    for image, mask in zip(images, labels):
        present = np.unique(mask)
        assert present.tolist() == list(range(len(present)))
        grey = image[mask == 0]
        assert (grey == grey[0, 0]).all()
        assert all(colours(image[mask == label]) == 1 for label in present)
        counts.append(len(present) - 1)
    assert max(counts) == MOST
    assert np.bincount(counts)[2:].min() > 15
    assert 0.05 < (labels > 0).mean() < 0.4


def test_shapes_are_outlines_and_crossings_are_ignored() -> None:
    images, labels = SCENES["shapes"](0, NUMBERS)
    assert OUTLINES.shape[0] == 4
    for outline in OUTLINES:
        assert ndimage.label(outline, np.ones((3, 3)))[1] == 1
        assert ndimage.binary_fill_holes(outline).sum() > 2 * outline.sum()
    np.testing.assert_array_equal(images[..., 0] > 0, labels > 0)
    assert set(np.unique(labels)) == {0, 1, 2, 3, 4, 255}
    counts = [len(set(np.unique(mask)) - {0, 255}) for mask in labels]
    assert min(counts) >= 1
    assert max(counts) == 4
