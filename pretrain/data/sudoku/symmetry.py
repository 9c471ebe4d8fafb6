"""The symmetries of Sudoku: 9! relabellings of the digits times 3,359,232 rearrangements of the cells.

Owns: drawing and applying them. A rearrangement permutes the three bands, the rows inside each band, the stacks and
their columns, and may transpose; it maps puzzles to puzzles with as many solutions. Driven by uniform numbers, so that
any random source serves: numpy's here, the loader's counter-based one in training.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pretrain.data.sudoku.board import Boards

NUM_UNIFORMS = 9 + 2 * (3 + 9) + 1


@dataclass(frozen=True)
class Symmetry:
    """digits [B, 10]: what each digit becomes (0 stays); cells [B, 81]: from which cell each cell is taken."""

    digits: Boards
    cells: NDArray[np.int64]

    def __call__(self, boards: Boards) -> Boards:
        """Apply to boards [B, 81]."""
        return np.take_along_axis(self.digits, np.take_along_axis(boards, self.cells, axis=1), axis=1)


def from_uniforms(uniforms: NDArray[np.floating]) -> Symmetry:
    """One symmetry for each row of numbers in [0, 1): [B, NUM_UNIFORMS]."""
    size = len(uniforms)
    relabel, rows, columns, transpose = np.split(uniforms, [9, 21, 33], axis=1)
    digits = np.zeros((size, 10), dtype=np.uint8)
    digits[:, 1:] = relabel.argsort(axis=1) + 1
    row, column = _lines(rows), _lines(columns)
    cells = row[:, :, None] * 9 + column[:, None, :]
    flipped = row[:, None, :] * 9 + column[:, :, None]
    cells = np.where(transpose[:, :, None] < 0.5, flipped, cells)
    return Symmetry(digits, cells.reshape(size, 81))


def draw(rng: np.random.Generator, size: int) -> Symmetry:
    """`size` symmetries, uniform over the whole group."""
    return from_uniforms(rng.random((size, NUM_UNIFORMS)))


def _lines(uniforms: NDArray[np.floating]) -> NDArray[np.int64]:
    """An order of nine lines that keeps bands together: [B, 3 + 9] -> [B, 9]."""
    bands = uniforms[:, :3].argsort(axis=1)
    inside = uniforms[:, 3:].reshape(-1, 3, 3).argsort(axis=2)
    return (bands[:, :, None] * 3 + inside).reshape(-1, 9)
