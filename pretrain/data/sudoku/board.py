"""A Sudoku board as text and as an array, and what makes one valid.

Owns: the 81-character text form (row by row; digits, and `.`, `0`, `-`, `_` or `*` for a blank) and the
rules of the game.

Shapes: B boards; a board is 81 cells, row by row, 0 for a blank and 1..9 for a digit, uint8.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError

Boards = NDArray[np.uint8]

BLANKS = ".0-_*"
_IGNORED = " \t\r\n|"


def parse(text: str, *, where: str = "puzzle") -> Boards:
    """Read one board. Spaces, bars and line breaks inside it do not count.

    Args:
        text: 81 cells, row by row.
        where: named in errors, e.g. "puzzles.txt, line 3".
    Returns: [81] uint8.
    Raises:
        UserError: not 81 cells, or a character that is neither a digit nor a blank.
    """
    cells = [character for character in text if character not in _IGNORED]
    for place, character in enumerate(cells):
        if character not in BLANKS and not (character.isascii() and character.isdigit()):
            raise UserError(
                f"{where}: {character!r} at cell {place + 1} is no digit; write 1-9, and '.' or 0 for a blank"
            )
    if len(cells) != 81:
        raise UserError(f"{where}: a board has 81 cells, this has {len(cells)}")
    return np.array([0 if character in BLANKS else int(character) for character in cells], dtype=np.uint8)


def text(board: Boards, *, blank: str = ".") -> str:
    """The 81-character form of a board [81]."""
    return "".join(str(digit) if digit else blank for digit in np.asarray(board).tolist())


def grid(board: Boards, *, blank: str = ".") -> str:
    """A board [81] as 9 lines with bars between boxes, for people."""
    rows = [
        " | ".join(" ".join(str(digit) if digit else blank for digit in three) for three in row)
        for row in np.asarray(board).reshape(9, 3, 3)
    ]
    bar = "------+-------+------"
    return "\n".join([*rows[:3], bar, *rows[3:6], bar, *rows[6:]])


def units(boards: Boards) -> Boards:
    """The 27 units of each board: [B, 81] -> [B, 27, 9], 9 rows, 9 columns, 9 boxes."""
    square = boards.reshape(-1, 9, 9)
    boxes = boards.reshape(-1, 3, 3, 3, 3).swapaxes(2, 3).reshape(-1, 9, 9)
    return np.concatenate([square, square.swapaxes(1, 2), boxes], axis=1)


def is_consistent(boards: Boards) -> NDArray[np.bool_]:
    """True where no digit stands twice in a unit; blanks are allowed. [B, 81] -> [B]."""
    sets = np.sort(units(boards), axis=2)
    return ~((sets[..., 1:] == sets[..., :-1]) & (sets[..., 1:] > 0)).any(axis=(1, 2))


def is_solved(boards: Boards) -> NDArray[np.bool_]:
    """True where all 27 units hold each digit once. [B, 81] -> [B]."""
    return (boards > 0).all(axis=1) & (boards <= 9).all(axis=1) & is_consistent(boards)


def keeps_givens(boards: Boards, puzzles: Boards) -> NDArray[np.bool_]:
    """True where a board agrees with the givens of its puzzle. [B, 81] twice -> [B]."""
    return ((puzzles == 0) | (boards == puzzles)).all(axis=1)


def conflicts(board: Boards) -> list[str]:
    """What breaks the rules in one board [81], in words: `5 stands twice in row 3`."""
    names = [f"{kind} {place + 1}" for kind in ("row", "column", "box") for place in range(9)]
    found = []
    for name, unit in zip(names, units(board[None])[0], strict=True):
        digits, counts = np.unique(unit[unit > 0], return_counts=True)
        found += [f"{digit} stands twice in {name}" for digit in digits[counts > 1].tolist()]
    return found


def stack(lines: Iterable[Boards]) -> Boards:
    """Boards [81] as one array [B, 81]; [0, 81] if there are none."""
    boards = list(lines)
    return np.stack(boards) if boards else np.zeros((0, 81), dtype=np.uint8)
