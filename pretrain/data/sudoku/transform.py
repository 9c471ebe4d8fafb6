"""What the loader does to a Sudoku: decode it, and show it under a random symmetry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pretrain.data import counter
from pretrain.data.sudoku import record, symmetry


@dataclass(frozen=True)
class SudokuTransform:
    """Parts of a sample -> puzzle and solution. Picklable and pure.

    With `symmetries` each pass over the data shows each board under another of its 1.2e12 symmetries, keyed by
    (seed, epoch, sample); the published recipe has none.
    """

    seed: int
    symmetries: bool = True

    def __call__(self, parts: dict[str, Any], epoch: int, sample: int, key: int) -> dict[str, np.ndarray]:
        """Returns {"puzzle": uint8 [81], "solution": uint8 [81]}, 0 for a blank."""
        puzzle, solution = record.decode(parts)
        if self.symmetries:
            draws = counter.uniform(counter.key(self.seed, epoch, sample, 0, "symmetry"), symmetry.NUM_UNIFORMS)
            change = symmetry.from_uniforms(draws.reshape(1, -1))
            puzzle, solution = change(puzzle[None])[0], change(solution[None])[0]
        return {"puzzle": puzzle, "solution": solution}
