"""Readers of Sudoku collections: SATNet's tensors, RRN's and other CSV files, files with a puzzle a line, our shards.

Owns: turning what people have into `Puzzles`, with errors that name the line. Nothing is unpickled.

- SATNet (arXiv 1905.12149): a folder with features.pt and labels.pt, [10000, 9, 9, 9] one-hot, a blank all zero; an
  optional perm.pt holds the permutation of the 729 entries that its "permuted" experiment applies.
- RRN (arXiv 1711.08028): train.csv, valid.csv, test.csv, each line `puzzle,solution`. Files with a header or further
  columns (the Kaggle sets) work too: the first two fields of 81 cells count.
- Text: 81 characters a line, digits and `.` or 0; `#` begins a comment. Solutions are found by the solver.

Files may be gzipped.
"""

from __future__ import annotations

import gzip
import re
import zlib
from pathlib import Path

import numpy as np

from configs.errors import UserError
from pretrain.data.sudoku import board, solver
from pretrain.data.sudoku.board import Boards
from pretrain.data.sudoku.generator import Puzzles

_FIELDS = re.compile(rb"[,;\s]+")
_DIGIT = np.full(256, 255, dtype=np.uint8)
_DIGIT[[ord(character) for character in board.BLANKS]] = 0
_DIGIT[[ord(character) for character in "123456789"]] = range(1, 10)


def read(location: str | Path) -> Puzzles:
    """Read a collection: a folder of SATNet's, a folder of shards, or a text or CSV file, plain or gzipped.

    Every puzzle has been checked: it agrees with its solution, the solution is valid, and where the file gave none, the
    puzzle has exactly one.

    Raises:
        UserError: nothing there, or a puzzle is malformed or has no or several solutions.
    """
    path = Path(location)
    if (path / "features.pt").is_file():
        return read_satnet(path)
    if path.is_file() and path.suffix != ".tar":
        return read_text(path)
    if not path.exists():
        raise UserError(f"{location}: no such file or folder")
    return read_shards(location)


def read_text(path: Path) -> Puzzles:
    """Read a file with one puzzle a line, alone or followed by its solution."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            lines = file.read().splitlines()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    numbers, puzzles, solutions = [], [], []
    for number, line in enumerate(lines, 1):
        fields = [field for field in _FIELDS.split(line.split(b"#")[0].strip(b" \t,;")) if field]
        boards = [field for field in fields if len(field) == 81]
        if not boards:
            is_header = number == 1 and not any(byte in b"123456789" for byte in line)
            if fields and not is_header:
                longest = max(len(field) for field in fields)
                raise UserError(f"{path}, line {number}: no field of 81 cells (the longest has {longest})")
            continue
        numbers.append(number)
        puzzles.append(boards[0])
        solutions.append(boards[1] if len(boards) > 1 else b"0" * 81)
    if not puzzles:
        raise UserError(f"{path} has no puzzle: expected 81 characters a line")
    where = [f"{path}, line {number}" for number in numbers]
    return checked(_decode(puzzles, where), _decode(solutions, where), where)


def read_satnet(folder: Path) -> Puzzles:
    """Read SATNet's features.pt and labels.pt; a set stored permuted is set right by perm.pt."""
    puzzles, solutions = (_one_hot(folder / name) for name in ("features.pt", "labels.pt"))
    if len(puzzles) != len(solutions):
        raise UserError(f"{folder}: features.pt has {len(puzzles)} boards, labels.pt {len(solutions)}")
    if not board.is_solved(_digits(solutions)).all() and (folder / "perm.pt").is_file():
        order = np.argsort(_tensor(folder / "perm.pt").astype(np.int64))
        puzzles, solutions = puzzles[:, order], solutions[:, order]
    where = [f"{folder}, board {number}" for number in range(len(puzzles))]
    return checked(_digits(puzzles), _digits(solutions), where)


def read_shards(location: str | Path) -> Puzzles:
    """Read a shard set of ours (make_shards.py sudoku)."""
    from pretrain.data.index import ShardIndex
    from pretrain.data.shards import ShardReader
    from pretrain.data.sudoku import record

    index = ShardIndex.open(location)
    reader = ShardReader(index)
    pairs = [record.decode(reader.read(sample)) for sample in range(len(index))]
    puzzles, solutions = (board.stack(pair[side] for pair in pairs) for side in (0, 1))
    where = [f"{location}: sample {key}" for key in index.keys(range(len(index)))]
    return checked(puzzles, solutions, where)


def checked(puzzles: Boards, solutions: Boards, where: list[str]) -> Puzzles:
    """Check puzzles against their solutions [B, 81]; a solution that is all blank is found by the solver.

    Args:
        where: names each puzzle in errors [B].
    """
    missing = np.flatnonzero(~solutions.any(axis=1))
    if len(missing):
        solutions = solutions.copy()
        found = solver.solve(puzzles[missing], limit=2)
        solutions[missing] = found.boards
        for row, count in zip(missing[found.counts != 1], found.counts[found.counts != 1], strict=True):
            raise UserError(f"{where[row]}: {explain(puzzles[row], int(count))}")
    for row in np.flatnonzero(~board.is_solved(solutions)):
        problem = (board.conflicts(solutions[row]) or ["it has blanks"])[0]
        raise UserError(f"{where[row]}: the solution given is not valid: {problem}")
    for row in np.flatnonzero(~board.keeps_givens(solutions, puzzles)):
        raise UserError(f"{where[row]}: the solution given contradicts the puzzle's givens")
    return Puzzles(puzzles, solutions)


def explain(puzzle: Boards, count: int) -> str:
    """Why a puzzle [81] with `count` (0 or 2) solutions cannot be used, in words."""
    if count > 1:
        return f"the puzzle has several solutions ({int((puzzle > 0).sum())} givens)"
    broken = board.conflicts(puzzle)
    return "the puzzle has no solution" + (
        f": {'; '.join(broken)}" if broken else ", though no digit stands twice in a unit"
    )


def _decode(boards: list[bytes], where: list[str]) -> Boards:
    """Boards of 81 bytes each -> [B, 81]."""
    raw = np.frombuffer(b"".join(boards), dtype=np.uint8).reshape(-1, 81)
    digits = _DIGIT[raw]
    for row in np.flatnonzero((digits == 255).any(axis=1)):
        board.parse(raw[row].tobytes().decode("latin-1"), where=where[row])
    return digits


def _one_hot(path: Path) -> Boards:
    """A one-hot tensor [B, 9, 9, 9] as [B, 729] of 0 and 1."""
    values = _tensor(path)
    if values.ndim != 4 or values.shape[1:] != (9, 9, 9):
        raise UserError(f"{path}: expected a tensor [boards, 9, 9, 9], found {list(values.shape)}")
    return (values > 0.5).reshape(len(values), 729).astype(np.uint8)


def _tensor(path: Path) -> np.ndarray:
    """A tensor stored by torch.save, read without unpickling objects."""
    import pickle

    import torch

    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{path} cannot be read as a tensor: {str(error).splitlines()[0]}") from error
    if not isinstance(values, torch.Tensor):
        raise UserError(f"{path} holds a {type(values).__name__}, not a tensor")
    return values.numpy()


def _digits(one_hot: Boards) -> Boards:
    """[B, 729] of 0 and 1 -> digits [B, 81], 0 for a cell without any."""
    cells = one_hot.reshape(-1, 81, 9)
    return np.where(cells.any(axis=2), cells.argmax(axis=2) + 1, 0).astype(np.uint8)
