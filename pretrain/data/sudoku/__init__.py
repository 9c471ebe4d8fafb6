"""Sudoku as data: boards, a solver, generators, readers of the published sets, the loader's transform."""
