"""What the loader does to a Sudoku: decode it, and show it under a random symmetry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from pretrain.data import counter
from pretrain.data.fetch import Work
from pretrain.data.sudoku import record, symmetry


@dataclass(frozen=True)
class SudokuTransform:
    """Parts of a sample -> puzzle and solution. Picklable and pure.

    With `symmetries` each pass over the data shows each board under another of its 1.2e12 symmetries, keyed by
    (seed, epoch, sample); the published recipe has none.
    """

    seed: int
    symmetries: bool = True

    def draws(self, epochs: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """The uniform numbers that make the symmetries of samples: int64 [n] each -> float64 [n, NUM_UNIFORMS]."""
        return counter.uniform(counter.key(self.seed, epochs, samples, 0, "symmetry"), symmetry.NUM_UNIFORMS)

    def __call__(self, parts: Mapping[str, Any], draws: np.ndarray) -> Work:
        """Returns what makes {"puzzle": uint8 [81], "solution": uint8 [81]}, 0 for a blank."""
        return partial(self._boards, parts, draws)

    def _boards(self, parts: Mapping[str, Any], draws: np.ndarray) -> dict[str, np.ndarray]:
        puzzle, solution = record.decode(parts)
        if self.symmetries:
            change = symmetry.from_uniforms(draws[None])
            puzzle, solution = change(puzzle[None])[0], change(solution[None])[0]
        return {"puzzle": puzzle, "solution": solution}
