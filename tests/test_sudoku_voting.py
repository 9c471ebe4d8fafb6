"""Votes and scores by hand; roll-outs against plain forward passes of the same network."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from downstream import voting
from downstream.rollout import Rollouts, noise, roll_out
from downstream.solver import Solver
from pretrain.data.sudoku import generator
from pretrain.models.sudoku import SudokuNet


def solver_of(kind: str = "akorn") -> Solver:
    torch.manual_seed(0)
    net = SudokuNet(kind, embed_dim=16, num_heads=2, num_steps=4, n=4).eval().requires_grad_(False)
    return Solver(net, kind, {}, torch.device("cpu"))


@pytest.fixture(scope="module")
def made() -> generator.Puzzles:
    return generator.generate(5, seed=0, givens=(50, 60))


def example() -> Rollouts:
    """Two puzzles, three starts, boards that are all one digit."""
    boards = np.array([[[1] * 81, [2] * 81, [2] * 81], [[3] * 81, [4] * 81, [5] * 81]], dtype=np.uint8)[None]
    energy = np.array([[[-3.0, -5.0, -1.0], [-2.0, -1.0, -4.0]]], dtype=np.float32)
    energy_sum = np.array([[[-9.0, -5.0, -1.0], [-2.0, -8.0, -4.0]]], dtype=np.float32)
    confidence = np.array([[[0.5, 0.6, 0.9], [0.8, 0.7, 0.1]]], dtype=np.float32)
    return Rollouts((16,), boards, energy, energy_sum, confidence, np.ones((2, 3), dtype=bool))


@pytest.mark.parametrize(
    ("name", "starts", "expected"),
    [
        ("energy", 3, [2, 5]),
        ("energy", 1, [1, 3]),
        ("energy-sum", 3, [1, 4]),
        ("c-vote", 3, [2, 3]),
        ("c-vote", 2, [2, 3]),
        ("majority", 3, [2, 3]),
    ],
)
def test_votes_by_hand(name: str, starts: int, expected: list[int]) -> None:
    chosen = voting.vote(example(), 0, name, starts=starts)
    assert chosen[:, 0].tolist() == expected
    assert (chosen == chosen[:, :1]).all()


def test_majority_is_by_cell() -> None:
    rollouts = example()
    rollouts.boards[0, 0] = np.array([[1, 2, 3] * 27, [1, 5, 3] * 27, [4, 2, 3] * 27])
    assert voting.vote(rollouts, 0, "majority")[0, :3].tolist() == [1, 2, 3]


def test_intervals_and_auc_against_closed_forms() -> None:
    low, high = voting.interval(81, 263)  # the example of Newcombe, Statistics in Medicine 1998
    assert (low, high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert voting.interval(0, 10)[0] == 0.0
    rng = np.random.default_rng(0)
    scores, correct = rng.integers(0, 20, 200).astype(float), rng.random(200) < 0.4
    expected = mannwhitneyu(scores[correct], scores[~correct]).statistic / (correct.sum() * (~correct).sum())
    assert voting.auc(scores, correct) == pytest.approx(expected)
    assert math.isnan(voting.auc(scores, np.ones(200, dtype=bool)))
    within = voting.auc_within(np.array([[1.0, 2.0], [2.0, 1.0], [0.0, 1.0]]), np.array([[0, 1], [0, 1], [1, 1]]) > 0)
    assert within == 0.5


def test_rollouts_equal_plain_forward_passes(made: generator.Puzzles) -> None:
    solver = solver_of()
    rollouts = roll_out(solver, made.puzzles, steps=[3, 8], starts=3, seed=1, batch_size=4)
    for row in (0, 4):
        for start in (0, 2):
            x = noise(solver, np.array([row]), np.array([start]), seed=1)
            digits = torch.from_numpy(made.puzzles[row : row + 1].astype(np.int64))
            for place, steps in enumerate((3, 8)):
                plain = solver.net.forward_oscillators(digits, x, steps=steps, energy=True)
                chances, answers = plain.logits.softmax(2).max(2)
                expected = np.where(made.puzzles[row] > 0, made.puzzles[row], answers[0].numpy() + 1)
                assert (rollouts.boards[place, row, start] == expected).all()
                energies = plain.energy[-1][1:, 0]
                assert rollouts.energy[place, row, start] == pytest.approx(energies[-1].item(), rel=1e-4)
                assert rollouts.energy_sum[place, row, start] == pytest.approx(energies.sum().item(), rel=1e-4)
                assert rollouts.confidence[place, row, start] == pytest.approx(chances.mean().item(), rel=1e-4)


def test_starts_depend_on_nothing_but_their_key(made: generator.Puzzles) -> None:
    solver = solver_of()
    whole = roll_out(solver, made.puzzles, steps=[4], starts=4, seed=2, batch_size=20)
    part = roll_out(solver, made.puzzles[2:], steps=[4], starts=2, seed=2, batch_size=3, first=2)
    np.testing.assert_allclose(part.energy, whole.energy[:, 2:, :2], rtol=1e-4)
    assert np.ptp(whole.energy[0, 0]) > 0


@pytest.mark.parametrize("kind", ["itrsa", "transformer"])
def test_controls_run_once(kind: str, made: generator.Puzzles) -> None:
    rollouts = roll_out(solver_of(kind), made.puzzles, steps=[2, 5], starts=7, seed=0, batch_size=4)
    assert rollouts.boards.shape == (2 if kind == "itrsa" else 1, 5, 1, 81)
    assert np.isnan(rollouts.energy).all()
    assert rollouts.ran.all()


def test_finishing_skips_the_rest_of_a_solved_puzzle(made: generator.Puzzles) -> None:
    # Full grids are solved by any network, since givens are put back.
    puzzles = made.solutions.copy()
    puzzles[3:] = made.puzzles[3:]
    rollouts = roll_out(solver_of(), puzzles, steps=[2], starts=6, seed=0, batch_size=5, finish=True)
    assert rollouts.ran.sum(axis=1).tolist() == [1, 1, 1, 6, 6]
