"""An independent Sudoku solver for the tests: exact cover by Knuth's Algorithm X, one board at a time."""

from __future__ import annotations

from collections.abc import Iterator


def solutions(puzzle: list[int]) -> Iterator[list[int]]:
    """All solutions of a puzzle of 81 digits, 0 for blanks."""
    rows = {
        (cell, digit): [
            ("cell", cell),
            ("row", cell // 9, digit),
            ("column", cell % 9, digit),
            ("box", cell // 27, cell % 9 // 3, digit),
        ]
        for cell in range(81)
        for digit in range(1, 10)
    }
    columns: dict[tuple, set] = {}
    for row, covered in rows.items():
        for column in covered:
            columns.setdefault(column, set()).add(row)
    chosen = []
    for cell, digit in enumerate(puzzle):
        if digit:
            if any(column not in columns for column in rows[cell, digit]):
                return
            _select(columns, rows, (cell, digit))
            chosen.append((cell, digit))
    for answer in _search(columns, rows, chosen):
        yield [digit for _, digit in sorted(answer)]


def count(puzzle: list[int], limit: int = 2) -> int:
    """Number of solutions, at most `limit`."""
    return sum(1 for _, _ in zip(range(limit), solutions(puzzle)))


def _search(columns: dict, rows: dict, chosen: list) -> Iterator[list]:
    if not columns:
        yield list(chosen)
        return
    column = min(columns, key=lambda name: len(columns[name]))
    for row in sorted(columns[column]):
        chosen.append(row)
        removed = _select(columns, rows, row)
        yield from _search(columns, rows, chosen)
        _deselect(columns, rows, row, removed)
        chosen.pop()


def _select(columns: dict, rows: dict, row: tuple) -> list[set]:
    removed = []
    for column in rows[row]:
        for clashing in columns[column]:
            for other in rows[clashing]:
                if other != column and other in columns:
                    columns[other].discard(clashing)
        removed.append(columns.pop(column))
    return removed


def _deselect(columns: dict, rows: dict, row: tuple, removed: list[set]) -> None:
    for column in reversed(rows[row]):
        columns[column] = removed.pop()
        for clashing in columns[column]:
            for other in rows[clashing]:
                if other != column and other in columns:
                    columns[other].add(clashing)
