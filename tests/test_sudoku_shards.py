"""Sudoku shards from the command line to the reader and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from configs.errors import UserError
from pretrain import make_shards
from pretrain.data.shards import ShardWriter
from pretrain.data.sudoku import board, generator, readers, record, solver
from tests.test_sudoku_readers import one_hot


def test_generated_shards_hold_what_the_generator_made(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["sudoku", str(tmp_path / "set"), "--count", "60", "--seed", "4", "--givens", "30-33", "--workers", "0"]
    assert make_shards.main([*command, "--per-shard", "25"]) == 0
    made, read = generator.generate(60, seed=4, givens=(30, 33)), readers.read(tmp_path / "set")
    assert sorted(map(board.text, made.puzzles)) == sorted(map(board.text, read.puzzles))
    assert board.keeps_givens(read.solutions, read.puzzles).all()
    assert make_shards.main(["--verify", str(tmp_path / "set"), "--workers", "1"]) == 0
    assert "60 samples in 3 shards, 0 problems" in capsys.readouterr().out


def test_shards_of_others_are_checked_too(tmp_path: Path) -> None:
    made = generator.generate(2, seed=0)
    with ShardWriter(tmp_path / "a-000000.tar") as writer:
        writer.write("good", record.encode(made.puzzles[0], made.solutions[0]))
        writer.write("wrong", record.encode(made.puzzles[1], made.solutions[0]))
    with pytest.raises(UserError, match="sample wrong: the solution given contradicts the puzzle's givens"):
        readers.read(tmp_path)


def test_satnet_splits_and_harder_puzzles_from_a_bank(tmp_path: Path) -> None:
    bank = generator.minimal(20, seed=1)
    for name, boards in (("features.pt", bank.puzzles), ("labels.pt", bank.solutions)):
        torch.save(one_hot(boards), tmp_path / name)
    assert make_shards.main(["sudoku-file", str(tmp_path), str(tmp_path / "set"), "--workers", "0"]) == 0
    assert len(readers.read(tmp_path / "set" / "train")) == 18
    test = readers.read(tmp_path / "set" / "test")
    assert set(map(board.text, test.puzzles)) == set(map(board.text, bank.puzzles[18:]))
    hard = ["sudoku-file", str(tmp_path), str(tmp_path / "hard"), "--count", "50", "--givens", "27", "--workers", "0"]
    assert make_shards.main(hard) == 0
    read = readers.read(tmp_path / "hard")
    assert (read.givens == 27).all()
    assert solver.is_unique(read.puzzles).all()


@pytest.mark.parametrize("givens", ["20-30", "a-b", "40-30", "31-42-50"])
def test_bad_ranges_are_refused(givens: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="givens"):
        make_shards.main(["sudoku", str(tmp_path / "set"), "--count", "5", "--givens", givens])


def test_wrong_records_are_named() -> None:
    made = generator.generate(1, seed=0)
    parts = record.encode(made.puzzles[0], made.solutions[0])
    assert record.problem(parts) is None
    other = made.puzzles[0].copy()
    place = int(np.flatnonzero(other)[0])
    other[place] = other[place] % 9 + 1
    assert record.problem(record.encode(other, made.solutions[0])) == "its solution contradicts its puzzle"
    assert record.problem(record.encode(made.puzzles[0], other)) == "its solution is not valid"
