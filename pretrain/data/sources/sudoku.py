"""Sudoku: generated puzzles, collections as people have them, and harder ones made from a collection.

A sample is one part, `txt`: puzzle and solution (pretrain/data/sudoku/record.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from configs.errors import UserError
from pretrain.data.sources.sample import Request, Sample, key_of
from pretrain.data.sudoku import generator, readers, record
from pretrain.data.sudoku.generator import Puzzles

DEFAULT_COUNT = 20_000
DEFAULT_GIVENS = (31, 42)
SATNET_TEST = 0.1  # the last tenth is the published test set


@dataclass(frozen=True)
class SudokuSource:
    """A set of puzzles in memory (162 bytes each)."""

    puzzles: Puzzles
    classes: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.puzzles)

    def read(self, numbers: np.ndarray) -> Iterator[Sample]:
        chosen = self.puzzles[numbers]
        for number, puzzle, solution in zip(numbers, chosen.puzzles, chosen.solutions):
            yield Sample(key_of(int(number)), record.encode(puzzle, solution))


def open_source(name: str, request: Request) -> dict[str, SudokuSource]:
    """`sudoku`: generated. `sudoku-file`: the puzzles of a file or folder, or with givens, harder ones made from them.

    Raises:
        UserError: givens that cannot be reached, or a malformed collection.
    """
    count = DEFAULT_COUNT if request.count is None else request.count
    if name == "sudoku":
        givens = request.givens or DEFAULT_GIVENS
        request.notes.append(
            f"generating {count} puzzles with {givens[0]} to {givens[1]} givens: about a minute per 50,000"
        )
        return {"": SudokuSource(generator.generate(count, seed=request.seed, givens=givens))}
    assert request.input is not None
    puzzles = readers.read(request.input)
    if request.givens is not None:
        return {"": SudokuSource(generator.harden(puzzles, count, seed=request.seed, givens=request.givens))}
    if (request.input / "features.pt").is_file():
        first = len(puzzles) - round(SATNET_TEST * len(puzzles))
        return {"train": SudokuSource(puzzles[:first]), "test": SudokuSource(puzzles[first:])}
    return {"": SudokuSource(puzzles)}


def parse_givens(text: str) -> tuple[int, int]:
    """`31-42` or `30`.

    Raises:
        UserError: anything else.
    """
    parts = text.split("-")
    if len(parts) > 2 or not all(part.isdigit() for part in parts):
        raise UserError(f"--givens {text!r}: write a range such as 31-42, or one number")
    return int(parts[0]), int(parts[-1])
