"""Choosing one answer among those of many starts, and how good the choice is.

Owns: the votes, scores with intervals, and how well energy tells right from wrong. Sources: energy voting, Miyato et
al. (AKOrN), arXiv 2410.13821; confidence voting, arXiv 2604.13521: the start whose mean top-1 probability is highest.

Shapes: P puzzles, S starts; boards [P, S, 81], energies and confidences [P, S].
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from downstream.rollout import Rollouts
from pretrain.data.sudoku.board import Boards


def vote(rollouts: Rollouts, place: int, name: str, *, starts: int | None = None) -> Boards:
    """The chosen boards [P, 81] at one number of steps, among the first `starts` starts.

    energy, energy-sum: the start with the lowest one. c-vote: with the highest confidence. majority: in each cell the
    digit that most starts give, the smallest one where several tie (the board need not be any start's own).
    """
    boards = rollouts.boards[place][:, :starts]
    if name == "majority":
        counts = np.stack([(boards == digit).sum(axis=1) for digit in range(1, 10)], axis=-1)
        return (counts.argmax(axis=-1) + 1).astype(np.uint8)
    better = {
        "energy": -rollouts.energy[place],
        "energy-sum": -rollouts.energy_sum[place],
        "c-vote": rollouts.confidence[place],
    }[name][:, :starts]
    chosen = np.where(np.isnan(better), -np.inf, better).argmax(axis=1)
    return boards[np.arange(len(boards)), chosen]


def right(boards: Boards, solutions: Boards) -> NDArray[np.bool_]:
    """True where a whole board is right: [..., 81] against [P, 81] (or [P, 1, 81])."""
    return np.asarray((boards == solutions).all(axis=-1))


def interval(successes: float, count: int, *, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share: low and high, 95 % by default."""
    if count == 0:
        return 0.0, 1.0
    share, spread = successes / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def score(correct: NDArray[np.bool_]) -> dict[str, float | int | list[float]]:
    """Board accuracy of answers [P] in percent, with its interval."""
    low, high = interval(int(correct.sum()), len(correct))
    return {
        "accuracy": 100 * float(correct.mean()) if len(correct) else float("nan"),
        "interval": [100 * low, 100 * high],
        "boards": len(correct),
    }


def by_givens(correct: NDArray[np.bool_], givens: NDArray[np.int64]) -> dict[int, dict]:
    """Scores of the puzzles with each number of givens."""
    return {int(number): score(correct[givens == number]) for number in np.unique(givens)}


def auc(scores: NDArray[np.floating], correct: NDArray[np.bool_]) -> float:
    """Chance that a right answer has a higher score than a wrong one, ties counted half; nan where all are alike."""
    from scipy.stats import rankdata

    positives, negatives = int(correct.sum()), int((~correct).sum())
    if not positives or not negatives:
        return float("nan")
    ranks = rankdata(scores)
    return float((ranks[correct].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def auc_within(scores: NDArray[np.floating], correct: NDArray[np.bool_]) -> float:
    """Mean over puzzles of the AUC among a puzzle's own starts, [P, S]; puzzles with both kinds of answers count."""
    each = [auc(row, hits) for row, hits in zip(scores, correct, strict=True)]
    found = [value for value in each if not math.isnan(value)]
    return float(np.mean(found)) if found else float("nan")


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4, ... and `most` itself: where curves over starts are read."""
    return sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most})
