"""A Sudoku as a sample of a shard: one part `txt` of two lines, the puzzle and its solution, 81 characters each."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from configs.errors import UserError
from pretrain.data.sudoku import board
from pretrain.data.sudoku.board import Boards

PART = "txt"
LENGTH = 164


def encode(puzzle: Boards, solution: Boards) -> dict[str, bytes]:
    """The parts of a sample from a puzzle [81] and its solution [81]."""
    return {PART: f"{board.text(puzzle)}\n{board.text(solution)}\n".encode()}


def decode(parts: Mapping[str, bytes]) -> tuple[Boards, Boards]:
    """Puzzle [81] and solution [81] of a sample.

    Raises:
        UserError: the sample is no Sudoku.
    """
    if PART not in parts:
        raise UserError(f"no part {PART!r} in the sample: no Sudoku shards (make_shards.py sudoku makes them)")
    raw = np.frombuffer(parts[PART], dtype=np.uint8)
    if len(raw) != LENGTH or raw[81] != ord("\n"):
        raise UserError(f"a sample's {PART!r} is not two lines of 81 characters: these are no Sudoku shards")
    both = np.where(raw == ord("."), 0, raw - np.uint8(ord("0"))).astype(np.uint8)
    return both[:81], both[82:163]


def problem(parts: Mapping[str, bytes]) -> str | None:
    """What is wrong with a sample, None where it is a puzzle with a valid solution."""
    try:
        puzzle, solution = decode(parts)
    except UserError as error:
        return str(error)
    if not board.is_solved(solution[None])[0]:
        return "its solution is not valid"
    return None if board.keeps_givens(solution[None], puzzle[None])[0] else "its solution contradicts its puzzle"
