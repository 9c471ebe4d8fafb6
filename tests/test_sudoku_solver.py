"""The batched solver against an exact-cover solver, a textbook board, and qqwing where it is installed."""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pytest

from pretrain.data.sudoku import board, generator, solver
from tests import exact_cover
from tests.test_sudoku_board import PUZZLE, SOLUTION

# Known as hard for search: few givens, no easy deduction (17 givens; "AI Escargot"; "Golden Nugget").
HARD = (
    "4.....8.5.3..........7......2.....6.....8.4......1.......6.3.7.5..2.....1.4......",
    "1....7.9..3..2...8..96..5....53..9...1..8...26....4...3......1..4......7..7...3..",
    ".......39.....1..5..3.5.8....8.9...6.7...2...1..4.......9.8..5..2....6..4..7.....",
)


def damaged(seed: int, count: int) -> np.ndarray:
    """Puzzles with one, several or no solutions: minimal ones, with clues removed or changed."""
    rng = np.random.default_rng(seed)
    puzzles = generator.minimal(count, seed=seed).puzzles
    for row in range(count):
        cells = rng.permutation(np.flatnonzero(puzzles[row]))
        if row % 3 == 1:
            puzzles[row, cells[: 1 + row % 2]] = 0
        elif row % 3 == 2:
            puzzles[row, cells[0]] = puzzles[row, cells[0]] % 9 + 1
    return puzzles


def test_textbook_and_hard_puzzles() -> None:
    puzzles = board.stack(board.parse(text) for text in (PUZZLE, *HARD))
    found = solver.solve(puzzles)
    assert found.counts.tolist() == [1, 1, 1, 1]
    assert board.text(found.boards[0]) == SOLUTION
    assert board.is_solved(found.boards).all()
    assert board.keeps_givens(found.boards, puzzles).all()


def test_counts_and_solutions_equal_exact_cover() -> None:
    puzzles = damaged(0, 60)
    found = solver.solve(puzzles, limit=2)
    expected = [exact_cover.count(puzzle.tolist()) for puzzle in puzzles]
    assert found.counts.tolist() == expected
    assert set(expected) == {0, 1, 2}, "the sample must hold all three kinds"
    for puzzle, solution in zip(puzzles[found.counts == 1], found.boards[found.counts == 1], strict=True):
        assert next(exact_cover.solutions(puzzle.tolist())) == solution.tolist()
    several = found.counts == 2
    assert board.is_solved(found.boards[several]).all()
    assert board.keeps_givens(found.boards[several], puzzles[several]).all()


def test_counts_beyond_two_are_exact_up_to_the_limit() -> None:
    puzzle = board.parse(SOLUTION)
    rng = np.random.default_rng(1)
    for _ in range(5):
        holes = puzzle.copy()
        holes[rng.permutation(81)[:60]] = 0
        exact = exact_cover.count(holes.tolist(), limit=40)
        assert solver.solve(holes[None], limit=40).counts[0] == exact


def test_empty_and_contradictory_boards() -> None:
    empty = np.zeros((1, 81), dtype=np.uint8)
    assert solver.solve(empty).counts[0] == 2
    assert board.is_solved(solver.solve(empty, limit=1).boards)[0]
    twice = board.parse("11" + "." * 79)[None]
    assert solver.solve(twice).counts[0] == 0
    assert not solver.solve(twice).boards.any()
    assert len(solver.solve(empty[:0]).counts) == 0


def test_results_do_not_depend_on_the_batch() -> None:
    puzzles = damaged(2, 40)
    whole = solver.solve(puzzles)
    for row in range(0, 40, 7):
        alone = solver.solve(puzzles[row : row + 1])
        assert alone.counts[0] == whole.counts[row]
        if whole.counts[row] == 1:
            assert (alone.boards[0] == whole.boards[row]).all()


@pytest.mark.skipif(shutil.which("qqwing") is None, reason="qqwing (a Debian package) is not installed")
def test_against_qqwing() -> None:
    puzzles = generator.generate(50, seed=3, givens=(25, 40))
    lines = "\n".join(board.text(puzzle) for puzzle in puzzles.puzzles)
    command = ["qqwing", "--solve", "--one-line"]
    solved = subprocess.run(command, input=lines, capture_output=True, text=True, check=True).stdout.split()
    assert [line for line in solved if len(line) == 81] == [board.text(solution) for solution in puzzles.solutions]
