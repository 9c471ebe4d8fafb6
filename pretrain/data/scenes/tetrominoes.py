"""Tetrominoes: three of the 19 fixed tetrominoes on black, without overlap, as in the multi-object datasets.

Kabra et al., "Multi-object datasets" (2019), drawn as described by Greff et al., "IODINE", arXiv 1903.00450: 35 px
scenes, here cut to rows and columns [1:33] as the published AKOrN evaluation cuts them; unit squares of 5 px, in red,
green, blue, yellow, magenta or cyan. The original set has 17 of the 19 orientations; it is not documented which.

B scenes; 3 objects; A attempts at a place; 19 shapes of 4 squares.
"""

from __future__ import annotations

import numpy as np

from pretrain.data.counter import key, uniform

CANVAS, CUT, UNIT = 35, slice(1, 33), 5  # pixels
OBJECTS = 3
ATTEMPTS = 24  # places tried for each object before the whole scene is drawn anew
ROUNDS = 16

ONE_SIDED = {
    "I": ["####"],
    "O": ["##", "##"],
    "T": ["###", ".#."],
    "S": [".##", "##."],
    "Z": ["##.", ".##"],
    "J": ["#..", "###"],
    "L": ["..#", "###"],
}
COLOURS = np.array(
    [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 0, 255], [0, 255, 255]], np.uint8
)  # [6, 3]
WHITE = np.full(3, 255, np.uint8)


def fixed_tetrominoes() -> list[np.ndarray]:
    """All orientations of the seven one-sided tetrominoes, without repetition: bool [h, w] each."""
    found: dict[tuple[object, ...], np.ndarray] = {}
    for rows in ONE_SIDED.values():
        grid = np.array([[cell == "#" for cell in row] for row in rows])
        for turns in range(4):
            turned = np.rot90(grid, turns)
            found.setdefault((turned.shape, turned.tobytes()), turned)
    return list(found.values())


def _stamps() -> tuple[np.ndarray, np.ndarray]:
    """Shapes in pixels at the top left of a 20 x 20 field, bool [19, 20, 20], and their (height, width) [19, 2]."""
    shapes = fixed_tetrominoes()
    stamps = np.zeros((len(shapes), 4 * UNIT, 4 * UNIT), bool)
    for stamp, shape in zip(stamps, shapes):
        pixels = np.kron(shape, np.ones((UNIT, UNIT), bool))
        stamp[: pixels.shape[0], : pixels.shape[1]] = pixels
    return stamps, np.array([shape.shape for shape in shapes]) * UNIT


STAMPS, EXTENTS = _stamps()


def masks(seed: int, scenes: np.ndarray) -> np.ndarray:
    """Instance masks of whole scenes before the cut: int64 [B] -> uint8 [B, 35, 35], 1 to 3 on the objects."""
    result = np.zeros((len(scenes), CANVAS, CANVAS), np.uint8)
    open_ = np.arange(len(scenes))
    for attempt in range(ROUNDS):
        placed = _place(uniform(key(seed, attempt, scenes[open_], 0, "tetrominoes"), OBJECTS * ATTEMPTS * 3))
        whole = placed.max(axis=(1, 2)) == OBJECTS
        result[open_[whole]] = placed[whole]
        open_ = open_[~whole]
        if not len(open_):
            return result
    raise AssertionError("no room for three tetrominoes in any round")


def _place(numbers: np.ndarray) -> np.ndarray:
    """One try at each scene: uniform [B, 3 * A * 3] -> uint8 [B, 35, 35]; an object without a place is missing."""
    choices = numbers.reshape(len(numbers), OBJECTS, ATTEMPTS, 3)
    field = np.zeros((len(numbers), CANVAS, CANVAS), np.uint8)
    rows = np.arange(len(numbers))
    offsets = np.arange(4 * UNIT)
    for number in range(1, OBJECTS + 1):
        waiting = rows
        for attempt in range(ATTEMPTS):
            which, y, x = choices[waiting, number - 1, attempt].T
            shape = (which * len(STAMPS)).astype(np.int64)
            top, left = ((CANVAS + 1 - EXTENTS[shape].T) * np.stack([y, x])).astype(np.int64)
            # The field of a stamp may hang over the edge where the stamp is empty: those pixels go to the last row.
            ys = np.minimum(top[:, None] + offsets, CANVAS - 1)[:, :, None]
            xs = np.minimum(left[:, None] + offsets, CANVAS - 1)[:, None, :]
            stamp = STAMPS[shape]
            here = field[waiting[:, None, None], ys, xs]
            free = ~(stamp & (here > 0)).any(axis=(1, 2))
            scene, y_in, x_in = np.nonzero(stamp & free[:, None, None])
            field[waiting[scene], top[scene] + y_in, left[scene] + x_in] = number
            waiting = waiting[~free]
            if not len(waiting):
                break
    return field


def _paint(mask: np.ndarray, colours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images of masks [B, 35, 35] with one colour for each object, uint8 [B, 3, 3]; both cut to 32 px."""
    palette = np.concatenate([np.zeros_like(colours[:, :1]), colours], axis=1)
    mask = np.ascontiguousarray(mask[:, CUT, CUT])
    return palette[np.arange(len(mask))[:, None, None], mask], mask


def _colours(seed: int, scenes: np.ndarray) -> np.ndarray:
    choice = uniform(key(seed, 0, scenes, 0, "tetrominoes colours"), OBJECTS)
    return COLOURS[(choice * len(COLOURS)).astype(np.int64)]  # [B, 3 objects, 3]


def coloured(seed: int, scenes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each object in a colour of its own drawing (two may be equal): uint8 [B, 32, 32, 3], uint8 [B, 32, 32]."""
    return _paint(masks(seed, scenes), _colours(seed, scenes))


def one_colour(seed: int, scenes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same scenes with all objects in the colour of the first."""
    return _paint(masks(seed, scenes), np.repeat(_colours(seed, scenes)[:, :1], OBJECTS, axis=1))


def white(seed: int, scenes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same scenes with all objects white."""
    return _paint(masks(seed, scenes), np.broadcast_to(WHITE, (len(scenes), OBJECTS, 3)))
