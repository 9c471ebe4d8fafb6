"""Answers of a Sudoku solver from many random starts, read at several numbers of steps.

Owns: running (puzzle, start) pairs in batches, going on from one number of steps to the next without beginning again,
and what is kept of each: the board, its energies, how probable the network finds it.

The noise of a start is a function of (seed, puzzle, start): it depends neither on the batch nor on the other starts.

Shapes: P puzzles, S starts, M numbers of steps, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from downstream.solver import Solver
from pretrain.data import counter
from pretrain.data.sudoku import board
from pretrain.data.sudoku.board import Boards


@dataclass
class Rollouts:
    """What came of P puzzles from S starts at M numbers of steps.

    Attributes:
        steps: the numbers of steps [M], rising.
        boards: answers, givens put back, uint8 [M, P, S, 81].
        energy, energy_sum: published energy at the last step, and summed over all steps; nan for controls [M, P, S].
        confidence: mean over the cells of the largest class probability, of the network's own answer [M, P, S].
        ran: False for starts that were not run, since their puzzle was finished [P, S].
    """

    steps: tuple[int, ...]
    boards: Boards
    energy: NDArray[np.float32]
    energy_sum: NDArray[np.float32]
    confidence: NDArray[np.float32]
    ran: NDArray[np.bool_]


def roll_out(
    solver: Solver,
    puzzles: Boards,
    *,
    steps: Sequence[int],
    starts: int,
    seed: int,
    batch_size: int,
    first: int = 0,
    finish: bool = False,
) -> Rollouts:
    """Solve puzzles [P, 81] from `starts` starts each (one, for controls: they have no randomness).

    Args:
        steps: numbers of steps to read answers at.
        batch_size: pairs run at once.
        first: number of the first puzzle in its set, which keys the noise.
        finish: leave a puzzle's remaining starts out once one gives a board that breaks no rule.
    """
    starts = starts if solver.has_starts else 1
    wanted = tuple(sorted(set(steps))) if solver.net.kind != "transformer" else (1,)
    rollouts = _empty(wanted, len(puzzles), starts)
    solved = np.zeros(len(puzzles), dtype=bool)
    # With `finish`, starts go in rounds, so that later rounds hold the unsolved puzzles only.
    per_round = max(1, batch_size // max(1, len(puzzles))) if finish else starts
    for begin in range(0, starts, per_round):
        rows, columns = np.meshgrid(
            np.flatnonzero(~solved), np.arange(begin, min(begin + per_round, starts)), indexing="ij"
        )
        pairs = np.stack([rows.ravel(), columns.ravel()], axis=1)
        for at in range(0, len(pairs), batch_size):
            _run(solver, puzzles, pairs[at : at + batch_size], rollouts, seed, first)
        if finish and len(pairs):
            answers = rollouts.boards[-1][pairs[:, 0], pairs[:, 1]]
            solved[pairs[board.is_solved(answers), 0]] = True
    return rollouts


def noise(solver: Solver, puzzles: NDArray[np.int64], starts: NDArray[np.int64], *, seed: int) -> Tensor:
    """Starts [B, 81, C] of (puzzle, start) pairs, N(0, 1), on the solver's device."""
    keys = counter.key(seed, 0, puzzles, starts, "sudoku start").view(np.int64)
    return counter.normal(torch.from_numpy(keys).to(solver.device), solver.net.start_shape())


@torch.no_grad()
def _run(solver: Solver, puzzles: Boards, pairs: NDArray[np.int64], rollouts: Rollouts, seed: int, first: int) -> None:
    """Run pairs (puzzle, start) [B, 2] through all numbers of steps and write down what came of them."""
    rows, columns = pairs[:, 0], pairs[:, 1]
    given = puzzles[rows]
    digits = torch.from_numpy(given.astype(np.int64)).to(solver.device)
    state = noise(solver, rows + first, columns, seed=seed) if solver.has_starts else None
    total, done = torch.zeros(len(rows), device=solver.device), 0
    for place, steps in enumerate(rollouts.steps):
        if state is None:
            with solver.autocast():
                logits = solver.net(digits, steps=None if solver.net.kind == "transformer" else steps)
        else:
            # A model of one layer goes on from where it is; others begin again for every number of steps.
            with solver.autocast():
                output = solver.net.forward_oscillators(
                    digits, state, steps=steps - done, energy=True, continued=done > 0
                )
            logits, energies = output.logits, output.energy[-1]
            total = energies[1:].sum(0) + (total if done else 0)
            rollouts.energy[place, rows, columns] = energies[-1].cpu().numpy()
            rollouts.energy_sum[place, rows, columns] = total.cpu().numpy()
            if len(solver.net.blocks) == 1:
                state, done = output.oscillators[-1], steps
        chances, answers = logits.float().softmax(2).max(2)
        filled = np.where(given > 0, given, (answers + 1).cpu().numpy().astype(np.uint8))
        rollouts.boards[place, rows, columns] = filled
        rollouts.confidence[place, rows, columns] = chances.mean(1).cpu().numpy()
    rollouts.ran[rows, columns] = True


def _empty(steps: tuple[int, ...], puzzles: int, starts: int) -> Rollouts:
    shape = (len(steps), puzzles, starts)
    energy, energy_sum, confidence = (np.full(shape, np.nan, dtype=np.float32) for _ in range(3))
    boards = np.zeros((*shape, 81), dtype=np.uint8)
    return Rollouts(steps, boards, energy, energy_sum, confidence, np.zeros((puzzles, starts), dtype=bool))
