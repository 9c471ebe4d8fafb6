"""Readers of the published formats, on small files of the same make, and the errors for damaged ones."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.errors import UserError
from pretrain.data.sudoku import board, generator, readers, record
from pretrain.data.sudoku.transform import SudokuTransform
from tests.test_sudoku_board import PUZZLE, SOLUTION


@pytest.fixture(scope="module")
def made() -> generator.Puzzles:
    return generator.generate(12, seed=0)


def one_hot(boards: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.eye(10, dtype=np.float32)[boards][..., 1:].reshape(-1, 9, 9, 9))


def test_satnet_tensors_plain_and_permuted(made: generator.Puzzles, tmp_path: Path) -> None:
    permutation = torch.randperm(729, generator=torch.Generator().manual_seed(0))
    for name, permuted in (("plain", False), ("permuted", True)):
        folder = tmp_path / name
        folder.mkdir()
        torch.save(permutation, folder / "perm.pt")
        for part, boards in (("features.pt", made.puzzles), ("labels.pt", made.solutions)):
            values = one_hot(boards)
            if permuted:
                values = values.reshape(-1, 729)[:, permutation].reshape(-1, 9, 9, 9)
            # The published files have torch's old, unzipped format.
            torch.save(values, folder / part, _use_new_zipfile_serialization=False)
        read = readers.read(folder)
        assert (read.puzzles == made.puzzles).all()
        assert (read.solutions == made.solutions).all()


def test_satnet_files_are_never_unpickled(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    torch.save(Evil(), tmp_path / "features.pt")
    torch.save(Evil(), tmp_path / "labels.pt")
    with pytest.raises(UserError, match=r"features\.pt cannot be read as a tensor"):
        readers.read(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_csv_with_and_without_header_and_lines(made: generator.Puzzles, tmp_path: Path) -> None:
    pairs = [
        (board.text(puzzle, blank="0"), board.text(solution))
        for puzzle, solution in zip(made.puzzles, made.solutions, strict=True)
    ]
    (tmp_path / "rrn.csv").write_text("".join(f"{puzzle},{solution}\n" for puzzle, solution in pairs))
    rows = "".join(f"{row},{puzzle},{solution},30,1.5\n" for row, (puzzle, solution) in enumerate(pairs))
    (tmp_path / "kaggle.csv").write_text("id,puzzle,solution,clues,difficulty\n" + rows)
    lines = "# a comment\n\n" + "".join(f"{puzzle.replace('0', '.')}  # note\r\n" for puzzle, _ in pairs)
    with gzip.open(tmp_path / "lines.txt.gz", "wt") as file:
        file.write(lines)
    for name in ("rrn.csv", "kaggle.csv", "lines.txt.gz"):
        read = readers.read(tmp_path / name)
        assert (read.puzzles == made.puzzles).all(), name
        assert (read.solutions == made.solutions).all(), name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PUZZLE + "\n" + PUZZLE[:-1], "line 2: no field of 81 cells .the longest has 80"),
        (PUZZLE[:-1] + "x", "line 1: 'x' at cell 81 is no digit"),
        ("." * 81, "line 1: the puzzle has several solutions .0 givens"),
        (PUZZLE + "\n55" + "." * 79, "line 2: the puzzle has no solution: 5 stands twice in row 1"),
        (f"{PUZZLE},{SOLUTION[:-2]}97", "line 1: the solution given is not valid: 9 stands twice in column 8"),
        (f"4{PUZZLE[1:]},{SOLUTION}", "line 1: the solution given contradicts the puzzle's givens"),
        ("", "has no puzzle"),
    ],
)
def test_damaged_files_name_the_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "puzzles.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        readers.read(path)


@pytest.mark.parametrize("keep", [0, 30])
def test_damaged_archives_are_named(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "puzzles.gz"
    path.write_bytes(gzip.compress(PUZZLE.encode())[:keep] or PUZZLE.encode())
    with pytest.raises(UserError, match=r"puzzles\.gz is damaged"):
        readers.read(path)


def test_missing_file() -> None:
    with pytest.raises(UserError, match="no such file"):
        readers.read("/nowhere/sudoku.csv")


def test_records_round_trip_and_refuse_other_samples(made: generator.Puzzles) -> None:
    for puzzle, solution in zip(made.puzzles, made.solutions, strict=True):
        both = record.decode(record.encode(puzzle, solution))
        assert (both[0] == puzzle).all()
        assert (both[1] == solution).all()
    with pytest.raises(UserError, match="no part 'txt'"):
        record.decode({"jpg": b""})
    with pytest.raises(UserError, match="no Sudoku shards"):
        record.decode({"txt": b"a caption"})


def made_of(transform: SudokuTransform, parts: dict[str, bytes], epoch: int, sample: int) -> dict[str, np.ndarray]:
    return transform(parts, transform.draws(np.array([epoch]), np.array([sample]))[0])()


def test_transform_is_pure_and_keyed(made: generator.Puzzles) -> None:
    parts = record.encode(made.puzzles[0], made.solutions[0])
    plain = made_of(SudokuTransform(seed=1, symmetries=False), parts, 0, 0)
    assert (plain["puzzle"] == made.puzzles[0]).all()
    assert (plain["solution"] == made.solutions[0]).all()
    transform = SudokuTransform(seed=1)
    first, again = made_of(transform, parts, 2, 5), made_of(transform, parts, 2, 5)
    assert all((first[name] == again[name]).all() for name in first)
    assert board.is_solved(first["solution"][None])[0]
    assert board.keeps_givens(first["solution"][None], first["puzzle"][None])[0]
    for other in ((3, 5), (2, 6)):
        assert (made_of(transform, parts, *other)["solution"] != first["solution"]).any()
