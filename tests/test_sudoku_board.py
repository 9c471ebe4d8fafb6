"""Boards: text form, validity, messages for what is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from configs.errors import UserError
from pretrain.data.sudoku import board

# A textbook puzzle and its solution (Wikipedia, "Sudoku").
PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
SOLUTION = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"


def test_text_round_trip_accepts_every_blank() -> None:
    for blank in board.BLANKS:
        assert board.text(board.parse(PUZZLE.replace(".", blank))) == PUZZLE
    spread = "\n".join(PUZZLE[row : row + 9] for row in range(0, 81, 9))
    assert board.text(board.parse(spread)) == PUZZLE
    assert board.text(board.parse(board.grid(board.parse(PUZZLE)).replace("------+-------+------\n", ""))) == PUZZLE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PUZZLE[:-1], "has 81 cells, this has 80"),
        (PUZZLE + "1", "has 81 cells, this has 82"),
        ("x" + PUZZLE[1:], "'x' at cell 1 is no digit"),
        (PUZZLE[:80] + "\u0665", "at cell 81 is no digit"),
    ],
)
def test_malformed_boards_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        board.parse(text)


def test_units_are_rows_columns_and_boxes() -> None:
    units = board.units(np.arange(81, dtype=np.uint8)[None])[0].tolist()
    rows = [list(range(9 * r, 9 * r + 9)) for r in range(9)]
    columns = [list(range(c, 81, 9)) for c in range(9)]
    boxes = [[9 * (3 * (b // 3) + r) + 3 * (b % 3) + c for r in range(3) for c in range(3)] for b in range(9)]
    assert units == rows + columns + boxes


def test_validity_of_the_textbook_solution_and_of_every_single_error() -> None:
    solved = board.parse(SOLUTION)
    wrong = np.repeat(solved[None], 81, axis=0)
    wrong[np.arange(81), np.arange(81)] = wrong[np.arange(81), np.arange(81)] % 9 + 1
    assert board.is_solved(solved[None]).tolist() == [True]
    assert not board.is_solved(wrong).any()
    assert not board.is_consistent(wrong).any()
    assert board.is_consistent(board.parse(PUZZLE)[None])[0]
    assert not board.is_solved(board.parse(PUZZLE)[None])[0]
    assert board.keeps_givens(solved[None], board.parse(PUZZLE)[None])[0]
    assert not board.keeps_givens(wrong[:1], board.parse(PUZZLE)[None])[0]


def test_conflicts_name_the_unit() -> None:
    wrong = board.parse("55" + "." * 79)
    assert board.conflicts(wrong) == ["5 stands twice in row 1", "5 stands twice in box 1"]
