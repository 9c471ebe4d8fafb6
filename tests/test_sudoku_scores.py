"""The tally of a Sudoku evaluation by hand, in one block and in two, and its pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from downstream import board_pictures
from downstream.rollout import Rollouts
from downstream.sudoku_scores import Tally
from pretrain.data.sudoku import generator

VOTES = ("energy", "c-vote")


@pytest.fixture(scope="module")
def made() -> generator.Puzzles:
    return generator.generate(4, seed=0, givens=(60, 61))


def rollouts_of(made: generator.Puzzles) -> Rollouts:
    """Two numbers of steps, two starts. Right: at the first, start 0 of puzzle 0; at the second, starts as listed."""
    right = np.array([[[1, 0], [0, 0], [0, 0], [0, 0]], [[1, 1], [0, 1], [1, 0], [0, 0]]], dtype=bool)
    wrong = made.solutions[:, None].copy()
    wrong[..., 0] = wrong[..., 0] % 9 + 1  # breaks the rules; relabelling all digits would not
    boards = np.where(right[..., None], made.solutions[None, :, None], wrong[None])
    # Energy prefers start 0 everywhere, confidence start 1.
    energy = np.broadcast_to(np.array([-2.0, -1.0], dtype=np.float32), (2, 4, 2)).copy()
    confidence = np.broadcast_to(np.array([0.1, 0.9], dtype=np.float32), (2, 4, 2)).copy()
    return Rollouts((4, 8), boards, energy, energy, confidence, np.ones((4, 2), dtype=bool))


def part_of(rollouts: Rollouts, rows: slice) -> Rollouts:
    arrays = (rollouts.boards, rollouts.energy, rollouts.energy_sum, rollouts.confidence)
    return Rollouts(rollouts.steps, *(array[:, rows] for array in arrays), rollouts.ran[rows])


@pytest.mark.parametrize("blocks", [(slice(0, 4),), (slice(0, 1), slice(1, 4))])
def test_scores_by_hand(blocks: tuple[slice, ...], made: generator.Puzzles) -> None:
    tally = Tally(VOTES, finish=False)
    for rows in blocks:
        tally.add(part_of(rollouts_of(made), rows), made[rows])
    found = tally.document()
    first, second = found["by_steps"]
    assert (first["T"], first["single"]["accuracy"], first["mean"]) == (4, 25.0, 12.5)
    assert (second["single"]["accuracy"], second["mean"]) == (50.0, 50.0)
    assert second["votes"]["energy"]["accuracy"] == 50.0  # start 0: puzzles 0 and 2
    assert second["votes"]["c-vote"]["accuracy"] == 50.0  # start 1: puzzles 0 and 1
    assert [point["accuracy"] for point in found["by_starts"]["c-vote"]] == [50.0, 50.0]
    assert sum(entry["boards"] for entry in found["by_givens"].values()) == 4
    # Puzzles 1 and 2 have a right and a wrong start each: energy is right about puzzle 2 only.
    assert found["auc"]["energy"]["within"] == 0.5
    assert found["finish"] is None


def test_finishing_counts_starts(made: generator.Puzzles) -> None:
    rollouts = rollouts_of(made)
    rollouts.ran[0, 1] = rollouts.ran[2, 1] = False
    tally = Tally(VOTES, finish=True)
    tally.add(rollouts, made)
    finish = tally.document()["finish"]
    assert finish["accuracy"] == 75.0
    assert finish["mean_starts"] == 1.5


def test_pictures(made: generator.Puzzles, tmp_path: Path) -> None:
    tally = Tally(VOTES, finish=False)
    tally.add(rollouts_of(made), made)
    board_pictures.curves(tmp_path / "curves.png", tally.document())
    board_pictures.energies(tmp_path / "energy.png", tally.energy[-1], tally.single[-1])
    for name in ("curves.png", "energy.png"):
        assert (tmp_path / name).stat().st_size > 5000
    answer = made.solutions[0].copy()
    blank = int(np.flatnonzero(made.puzzles[0] == 0)[0])
    args = (made.puzzles[0], made.solutions[0], np.ones(81), "step 1")
    right = np.asarray(board_pictures.picture(answer, *args))
    answer[blank] = answer[blank] % 9 + 1
    wrong = np.asarray(board_pictures.picture(answer, *args))
    reddish = (wrong[..., 0].astype(int) - wrong[..., 2] > 100).sum()
    assert reddish > 20
    assert (right[..., 0].astype(int) - right[..., 2] > 100).sum() == 0
