"""Generated sources: what a sample holds, and its label."""

from __future__ import annotations

import numpy as np

from pretrain.data.sources.generated import GeneratedSource, different_colours


def test_label_counts_the_colours_of_visible_objects() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    mask = np.zeros((4, 4), np.uint8)
    for number, colour in ((1, (255, 0, 0)), (2, (0, 255, 0)), (3, (255, 0, 0))):
        image[number, :], mask[number, :] = colour, number
    image[1, 0], mask[1, 0] = (9, 9, 9), 255  # ignored where outlines cross
    assert different_colours(image, mask) == 2
    assert different_colours(image, np.zeros_like(mask)) == 1


def test_labels_of_tetrominoes_are_as_often_as_chance_says() -> None:
    labels = np.array(
        [int(sample.parts["cls"]) for sample in GeneratedSource("tetrominoes", 2000, 3).read(np.arange(2000))]
    )
    expected = np.array([6 / 216, 90 / 216, 120 / 216])  # one, two, three colours among three draws from six
    assert np.abs(np.bincount(labels, minlength=3) / 2000 - expected).max() < 0.04
