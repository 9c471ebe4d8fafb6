"""A Sudoku solver for many boards at once: bit masks of candidates, propagation, exhaustive search.

Owns: the proof that a puzzle has no, one, or several solutions. Candidates of a cell are the bits of a uint16 (bit d-1
for digit d). Masks are laid out cell-major, [81, B], so that every operation runs over contiguous boards.

Propagation knows naked singles (a digit placed leaves its units) and hidden singles (a digit with one place left in a
unit goes there); what stays open is branched on at the cell with fewest candidates, all boards of a batch together, on
one stack. On one core of a server CPU a batch of 1,024 boards takes well under a millisecond per round.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pretrain.data.sudoku.board import Boards

Masks = NDArray[np.uint16]

ALL = np.uint16(511)
_BATCH = 2048
_DIGIT_OF = np.zeros(512, dtype=np.uint8)
_DIGIT_OF[1 << np.arange(9)] = np.arange(1, 10)
_BITS = np.array([bin(mask).count("1") for mask in range(512)], dtype=np.uint8)


@dataclass(frozen=True)
class Solutions:
    """counts [B]: solutions found, at most the limit asked for; boards [B, 81]: one of them, 0 where there is none."""

    counts: NDArray[np.int64]
    boards: Boards


def candidates(puzzles: Boards) -> Masks:
    """Initial masks of puzzles: [B, 81] -> [81, B]; a given has one candidate, a blank all nine."""
    digits = puzzles.T.astype(np.uint16)
    return np.where(digits > 0, np.uint16(1) << (np.maximum(digits, 1) - np.uint16(1)), ALL).astype(np.uint16)


def propagate(masks: Masks) -> tuple[Masks, NDArray[np.bool_]]:
    """Eliminate candidates until nothing changes. [81, B] -> masks [81, B], and [B] True where a contradiction came up.

    The masks of contradicting boards are unspecified. The input is not changed.
    """
    result, broken = masks.copy(), np.zeros(masks.shape[1], dtype=bool)
    active, work = np.arange(masks.shape[1]), masks.copy()
    while len(active):
        after, bad = _eliminate(work)
        going = ~bad & (after != work).any(axis=0)
        work = after
        stopped = len(going) - int(going.sum())
        if stopped == len(going) or stopped * 4 > len(going):
            result[:, active[~going]] = work[:, ~going]
            broken[active[bad]] = True
            active, work = active[going], np.ascontiguousarray(work[:, going])
    return result, broken


def solve(puzzles: Boards, *, limit: int = 2) -> Solutions:
    """Solve puzzles exhaustively. limit=2 decides uniqueness, limit=1 finds a solution.

    Args:
        puzzles: [B, 81], 0 for blanks.
    Returns: counts up to `limit` and a solution of each.
    """
    return search(candidates(puzzles), limit=limit)


def search(masks: Masks, *, limit: int = 2) -> Solutions:
    """As `solve`, from masks of candidates [81, B]."""
    size = masks.shape[1]
    counts, boards = np.zeros(size, dtype=np.int64), np.zeros((size, 81), dtype=np.uint8)
    stack, owners = masks, np.arange(size)
    while len(owners):
        width = min(_BATCH, 16 * len(np.unique(owners)))  # few boards: deep rather than wide
        work, owner = stack[:, -width:], owners[-width:]
        stack, owners = stack[:, :-width], owners[:-width]
        work, broken = propagate(work)
        solved = ~broken & is_decided(work)
        boards[owner[solved][::-1]] = digits(work[:, solved])[::-1]
        np.add.at(counts, owner[solved], 1)
        is_open = ~broken & ~solved & (counts[owner] < limit)
        children, parents = _branch(work[:, is_open], owner[is_open])
        keep = counts[owners] < limit
        stack = np.concatenate([stack[:, keep], children], axis=1)
        owners = np.concatenate([owners[keep], parents])
    return Solutions(np.minimum(counts, limit), boards)


def is_unique(puzzles: Boards) -> NDArray[np.bool_]:
    """True where a puzzle has exactly one solution. [B, 81] -> [B]."""
    return solve(puzzles, limit=2).counts == 1


def is_decided(masks: Masks) -> NDArray[np.bool_]:
    """True where every cell has at most one candidate left. [81, B] -> [B]."""
    return (masks & (masks - np.uint16(1)) == 0).all(axis=0)


def digits(masks: Masks) -> Boards:
    """Boards of decided masks: [81, B] -> [B, 81]."""
    return _DIGIT_OF[masks].T


def guess(masks: Masks, rng: np.random.Generator) -> None:
    """Decide, in place, one cell of each board [81, B]: a random candidate of the cell with fewest (at least two)."""
    cells, chosen = _narrowest(masks)
    weights = rng.random((len(chosen), 9)) * (chosen[:, None] >> np.arange(9, dtype=np.uint16) & 1)
    masks[cells, np.arange(len(cells))] = np.uint16(1) << weights.argmax(axis=1).astype(np.uint16)


def _narrowest(masks: Masks) -> tuple[NDArray[np.int64], Masks]:
    """The cell with fewest, but at least two, candidates of each board, and its mask: [81, B] -> [B], [B]."""
    bits = _BITS[masks]
    cells = np.where(bits < 2, np.uint8(10), bits).argmin(axis=0)
    return cells, masks[cells, np.arange(masks.shape[1])]


def _branch(masks: Masks, owners: NDArray[np.int64]) -> tuple[Masks, NDArray[np.int64]]:
    """One child for each candidate of the cell with fewest (but at least two) candidates of each board."""
    cells, chosen = _narrowest(masks)
    parents, shifts = np.nonzero(chosen[:, None] >> np.arange(9, dtype=np.uint16) & 1)
    children = masks[:, parents]
    children[cells[parents], np.arange(len(parents))] = np.uint16(1) << shifts.astype(np.uint16)
    return children, owners[parents]


def _eliminate(masks: Masks) -> tuple[Masks, NDArray[np.bool_]]:
    """One round of both rules on all units. Returns new masks and True [B] where a rule is broken."""
    single = masks & (masks - np.uint16(1)) == 0
    singles = np.where(single, masks, np.uint16(0))
    taken = np.zeros_like(masks)
    bad = (masks == 0).any(axis=0)
    for view, out in zip(_views(singles), _views(taken), strict=True):
        once, twice = _once_and_twice(view)
        bad |= twice.any(axis=_lead(twice))
        out |= _spread(once, view)
    after = np.where(single, masks, masks & ~taken)
    hidden = np.zeros_like(masks)
    for view, out in zip(_views(after), _views(hidden), strict=True):
        once, twice = _once_and_twice(view)
        bad |= (once != ALL).any(axis=_lead(once))
        out |= _spread(once & ~twice, view)
    forced = after & hidden
    return np.where(forced > 0, forced, after), bad


def _views(masks: Masks) -> tuple[Masks, ...]:
    """Rows, columns and boxes of [81, B] as views whose first axes (1, or 2 for boxes) run over the cells of a unit."""
    square = masks.reshape(9, 9, -1)
    boxes = masks.reshape(3, 3, 3, 3, -1).transpose(1, 3, 0, 2, 4)
    return square.swapaxes(0, 1), square, boxes


def _once_and_twice(view: Masks) -> tuple[Masks, Masks]:
    """Digits that occur at least once and at least twice in each unit: [9 or 3 x 3, units..., B] -> [units..., B]."""
    cells = [cell for lead in view for cell in lead] if view.ndim == 5 else list(view)
    once, twice = cells[0].copy(), np.zeros_like(cells[0])
    for cell in cells[1:]:
        twice |= once & cell
        once |= cell
    return once, twice


def _spread(unit: Masks, view: Masks) -> Masks:
    """A value of each unit broadcast to all of its cells."""
    return unit[None, None] if view.ndim == 5 else unit[None]


def _lead(unit: Masks) -> tuple[int, ...]:
    """All axes but the boards'."""
    return tuple(range(unit.ndim - 1))
