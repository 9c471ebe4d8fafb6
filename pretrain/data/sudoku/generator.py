"""Sudokus with one solution, made by the thousand: random full grids, clues taken away while the solution stays unique.

Owns: grids, digging, and hardening of a bank. Everything is a pure function of the seed.

Taking clue c of a uniquely solvable puzzle away keeps it unique exactly if no solution has another digit at c: with
that digit forbidden, the solver has to find nothing. That is decided for a whole batch of puzzles at once.

Digging at random cells reaches 25 givens in most grids and 22 in few. Puzzles with fewer, and harder ones, come from a
bank of known puzzles: any superset of the givens of a unique puzzle is unique, and so is its image under a symmetry.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from pretrain.data.sudoku import solver, symmetry
from pretrain.data.sudoku.board import Boards

FEWEST_GIVENS = 25
_BATCH = 4096
_BLOCK = 24


@dataclass(frozen=True)
class Puzzles:
    """puzzles [B, 81] with 0 for blanks, and their solutions [B, 81]."""

    puzzles: Boards
    solutions: Boards

    def __len__(self) -> int:
        return len(self.puzzles)

    def __getitem__(self, rows: NDArray | slice) -> Puzzles:
        return Puzzles(self.puzzles[rows], self.solutions[rows])

    @property
    def givens(self) -> NDArray[np.int64]:
        """Number of givens of each puzzle [B]."""
        return (self.puzzles > 0).sum(axis=1)


def concatenate(parts: list[Puzzles]) -> Puzzles:
    """Several sets as one."""
    return Puzzles(np.concatenate([part.puzzles for part in parts]), np.concatenate([part.solutions for part in parts]))


def generate(count: int, *, seed: int, givens: tuple[int, int] = (31, 42)) -> Puzzles:
    """`count` puzzles with one solution each; the number of givens is uniform over the range, both ends included.

    Raises:
        UserError: fewer than 25 givens asked for (random digging hardly gets there; `harden` a bank instead).
    """
    batches = list(stream(count, seed=seed, givens=givens))
    return concatenate(batches)


def stream(count: int, *, seed: int, givens: tuple[int, int] = (31, 42)) -> Iterator[Puzzles]:
    """As `generate`, in batches of at most 4,096, each a function of (seed, its number)."""
    check_givens(givens, fewest=FEWEST_GIVENS)
    for number in range(-(-count // _BATCH)):
        rng = np.random.default_rng((seed, number))
        yield _batch(min(_BATCH, count - number * _BATCH), rng, givens)


def check_givens(givens: tuple[int, int], *, fewest: int) -> None:
    """Raises UserError unless fewest <= low <= high <= 81."""
    low, high = givens
    if low < fewest and fewest == FEWEST_GIVENS:
        raise UserError(
            f"givens {low}-{high}: the generator makes puzzles with {fewest} givens or more; for fewer, make harder "
            "ones from a collection (make_shards.py sudoku-file)"
        )
    if not fewest <= low <= high <= 81:
        raise UserError(f"givens {low}-{high}: two numbers from {fewest} to 81, the smaller one first")


def grids(count: int, rng: np.random.Generator) -> Boards:
    """Random full grids [count, 81]: random digits in the cells with fewest candidates, anew where that fails."""
    masks, full = _diagonal_boxes(count, rng), np.zeros((count, 81), dtype=np.uint8)
    rows = np.arange(count)
    while len(rows):
        masks, broken = solver.propagate(masks)
        solved = solver.is_decided(masks) & ~broken
        full[rows[solved]] = solver.digits(masks[:, solved])
        rows, masks, broken = rows[~solved], masks[:, ~solved], broken[~solved]
        masks[:, broken] = _diagonal_boxes(int(broken.sum()), rng)
        solver.guess(masks, rng)
    return symmetry.draw(rng, count)(full)


def _diagonal_boxes(count: int, rng: np.random.Generator) -> solver.Masks:
    """Masks [81, count] of grids whose three diagonal boxes, which do not see each other, are filled at random."""
    masks = np.full((81, count), solver.ALL, dtype=np.uint16)
    for box in range(3):
        order = rng.random((count, 9)).argsort(axis=1).T
        cells = [(3 * box + row) * 9 + 3 * box + column for row in range(3) for column in range(3)]
        masks[cells] = np.uint16(1) << order.astype(np.uint16)
    return masks


def dig(solutions: Boards, targets: NDArray[np.int64], rng: np.random.Generator) -> Puzzles:
    """Take clues away in random order until `targets` [B] are left, or until none can go (a minimal puzzle)."""
    order = rng.random(solutions.shape).argsort(axis=1)
    puzzles, started = _first_block(solutions, targets, order)
    left = 81 - started
    for step in range(81):
        rows = np.flatnonzero((left > targets) & (step >= started))
        if not len(rows) and (left <= targets).all():
            break
        cells = order[rows, step]
        removed = puzzles[rows]
        removed[np.arange(len(rows)), cells] = 0
        can_go = _keeps_solution(removed, cells, solutions[rows, cells])
        puzzles[rows[can_go], cells[can_go]] = 0
        left[rows[can_go]] -= 1
    return Puzzles(puzzles, solutions)


def _first_block(
    solutions: Boards, targets: NDArray[np.int64], order: NDArray[np.int64]
) -> tuple[Boards, NDArray[np.int64]]:
    """Take the first 24 clues of the order away at once where that stays unique, as digging one by one would.

    Returns the puzzles [B, 81] and how many clues went [B]: 24 or 0. A quarter of the time of digging is saved.
    """
    puzzles = solutions.copy()
    np.put_along_axis(puzzles, order[:, :_BLOCK], 0, axis=1)
    goes = (targets <= 81 - _BLOCK) & solver.is_unique(puzzles)
    puzzles[~goes] = solutions[~goes]
    return puzzles, np.where(goes, _BLOCK, 0)


def minimal(count: int, *, seed: int) -> Puzzles:
    """Puzzles of which no clue can be taken away (20 to 28 givens, 24 on average): a bank made without any data."""
    rng = np.random.default_rng((seed, 81))
    parts = []
    for first in range(0, count, _BATCH):
        full = grids(min(_BATCH, count - first), rng)
        parts.append(dig(full, np.zeros(len(full), dtype=np.int64), rng))
    return concatenate(parts)


def harden(bank: Puzzles, count: int, *, seed: int, givens: tuple[int, int]) -> Puzzles:
    """`count` puzzles from a bank: one drawn for each, clues of its solution added, under a random symmetry.

    The number of givens is uniform over the range; only puzzles of the bank with no more than that are used for it.

    Raises:
        UserError: the bank is empty or has no puzzle with as few givens as the range begins with.
    """
    check_givens(givens, fewest=17)
    if not len(bank) or bank.givens.min() > givens[0]:
        fewest = f"its puzzles have {bank.givens.min()} givens or more" if len(bank) else "it has no puzzle"
        raise UserError(f"the bank cannot give puzzles with {givens[0]} givens: {fewest}")
    rng = np.random.default_rng((seed, 17))
    targets = rng.integers(givens[0], givens[1] + 1, size=count)
    order = np.argsort(bank.givens, kind="stable")
    usable = np.searchsorted(bank.givens[order], targets, side="right")
    chosen = bank[order[(rng.random(count) * usable).astype(np.int64)]]
    priority = rng.random(chosen.puzzles.shape) + (chosen.puzzles > 0)
    ranks = (-priority).argsort(axis=1).argsort(axis=1)
    puzzles = np.where(ranks < targets[:, None], chosen.solutions, np.uint8(0))
    change = symmetry.draw(rng, count)
    return Puzzles(change(puzzles), change(chosen.solutions))


def _batch(count: int, rng: np.random.Generator, givens: tuple[int, int]) -> Puzzles:
    """One batch: grids are dug until every drawn number of givens has been reached."""
    wanted = rng.integers(givens[0], givens[1] + 1, size=count)
    puzzles, solutions = np.zeros((2, count, 81), dtype=np.uint8)
    missing = np.arange(count)
    while len(missing):
        tried = np.tile(missing, max(1, 64 // len(missing)))
        made = dig(grids(len(tried), rng), wanted[tried], rng)
        done = made.givens == wanted[tried]
        puzzles[tried[done]], solutions[tried[done]] = made.puzzles[done], made.solutions[done]
        missing = np.setdiff1d(missing, tried[done])
    return Puzzles(puzzles, solutions)


def _keeps_solution(puzzles: Boards, cells: NDArray[np.int64], digits: Boards) -> NDArray[np.bool_]:
    """True where no solution of a puzzle has another digit than `digits` [B] at `cells` [B]."""
    masks = solver.candidates(puzzles)
    masks[cells, np.arange(len(cells))] = solver.ALL & ~(np.uint16(1) << (digits - np.uint8(1)).astype(np.uint16))
    return solver.search(masks, limit=1).counts == 0
