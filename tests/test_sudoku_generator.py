"""Generated puzzles: unique, as many givens as asked for, a function of the seed; symmetries form the group."""

from __future__ import annotations

import numpy as np
import pytest

from configs.errors import UserError
from pretrain.data.sudoku import board, generator, solver, symmetry
from tests import exact_cover


def test_puzzles_are_unique_and_givens_uniform() -> None:
    made = generator.generate(600, seed=5, givens=(27, 32))
    assert board.is_solved(made.solutions).all()
    assert board.keeps_givens(made.solutions, made.puzzles).all()
    assert solver.is_unique(made.puzzles).all()
    assert all(exact_cover.count(puzzle.tolist()) == 1 for puzzle in made.puzzles[:20])
    counts = np.bincount(made.givens, minlength=33)[27:33]
    assert counts.sum() == 600
    # Six equal cells: chi-square with 5 degrees of freedom stays below 20.5 with probability 0.999.
    assert ((counts - 100.0) ** 2 / 100.0).sum() < 20.5


def test_everything_is_a_function_of_the_seed() -> None:
    first, second = (generator.generate(40, seed=9) for _ in range(2))
    assert (first.puzzles == second.puzzles).all()
    assert (first.puzzles != generator.generate(40, seed=10).puzzles).any()


def test_grids_are_spread_evenly() -> None:
    grids = generator.grids(2000, np.random.default_rng(0))
    assert board.is_solved(grids).all()
    assert len(np.unique(grids, axis=0)) == 2000
    # Each cell holds each digit equally often: 2000/9 = 222 with standard deviation 14.
    counts = np.stack([(grids == digit).sum(axis=0) for digit in range(1, 10)])
    assert np.abs(counts - 2000 / 9).max() < 5 * 14.1


def test_minimal_puzzles_lose_uniqueness_with_any_clue() -> None:
    made = generator.minimal(12, seed=2)
    assert solver.is_unique(made.puzzles).all()
    for puzzle in made.puzzles:
        cells = np.flatnonzero(puzzle)
        fewer = np.repeat(puzzle[None], len(cells), axis=0)
        fewer[np.arange(len(cells)), cells] = 0
        assert not solver.is_unique(fewer).any()


def test_digging_in_blocks_equals_digging_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    grids = generator.grids(60, np.random.default_rng(1))
    targets = np.full(60, 30)
    blocks = generator.dig(grids, targets, np.random.default_rng(2))
    monkeypatch.setattr(generator, "_BLOCK", 0)
    single = generator.dig(grids, targets, np.random.default_rng(2))
    assert (blocks.puzzles == single.puzzles).all()


def test_hardened_puzzles_are_supersets_of_the_bank_up_to_symmetry() -> None:
    bank = generator.minimal(20, seed=3)
    made = generator.harden(bank, 500, seed=4, givens=(26, 30))
    assert sorted(set(made.givens.tolist())) == [26, 27, 28, 29, 30]
    assert solver.is_unique(made.puzzles).all()
    assert board.keeps_givens(made.solutions, made.puzzles).all()
    assert len(np.unique(made.puzzles, axis=0)) == 500
    exact = generator.harden(bank, 50, seed=4, givens=(int(bank.givens.min()), int(bank.givens.min())))
    assert (exact.givens == bank.givens.min()).all()


@pytest.mark.parametrize("givens", [(24, 30), (40, 30), (30, 82)])
def test_impossible_givens_are_refused(givens: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="givens"):
        generator.generate(3, seed=0, givens=givens)


def test_a_bank_without_such_puzzles_is_refused() -> None:
    with pytest.raises(UserError, match="cannot give puzzles with 18 givens"):
        generator.harden(generator.minimal(5, seed=0), 3, seed=0, givens=(18, 20))


def test_symmetries_keep_the_rules_and_cover_all_images() -> None:
    rng = np.random.default_rng(6)
    made = generator.generate(1, seed=1)
    change = symmetry.draw(rng, 3000)
    puzzles = change(np.repeat(made.puzzles, 3000, axis=0))
    solutions = change(np.repeat(made.solutions, 3000, axis=0))
    assert board.is_solved(solutions).all()
    assert board.keeps_givens(solutions, puzzles).all()
    assert solver.is_unique(puzzles[:50]).all()
    assert (np.sort(change.cells, axis=1) == np.arange(81)).all()
    # The first cell comes from each of the 81 cells equally often: 37 each, standard deviation 6.
    assert np.abs(np.bincount(change.cells[:, 0], minlength=81) - 3000 / 81).max() < 5 * 6.1
    assert np.abs(np.bincount(change.digits[:, 1], minlength=10)[1:] - 3000 / 9).max() < 5 * 17.2
    transposed = change.cells[:, 0] // 9 != change.cells[:, 1] // 9
    assert 0.45 < transposed.mean() < 0.55
