r"""Solve Sudokus with more steps and many random starts, and score the votes among them.

python downstream/sudoku.py --ckpt runs/sudoku --data data/sudoku/test --T 16 128 --starts 100 --vote energy c-vote
python downstream/sudoku.py --ckpt runs/sudoku --data hard.csv --T 128 --starts 1000 --finish
python downstream/sudoku.py --ckpt runs/sudoku \
    --puzzle 53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from configs import SudokuConfig, UserError
from configs.errors import run as run_entry
from configs.flags import parse

if TYPE_CHECKING:
    from downstream.rollout import Rollouts
    from downstream.solver import Solver
    from downstream.sudoku_scores import Tally
    from pretrain.data.sudoku.generator import Puzzles

TASK = "sudoku"
_PAIRS = 1 << 16  # (puzzle, start) pairs whose boards are held at once


def run(config: SudokuConfig, *, out_dir: Path | None = None) -> dict[str, Any]:
    """Score a set of puzzles, or solve the one given; writes results.json and pictures, prints, returns the results."""
    if config.ckpt is None:
        raise UserError("no solver: give --ckpt (run, export or a published .pth file)")
    if config.puzzle is None and config.data is None:
        raise UserError("nothing to solve: give --data (shards, CSV, text file) or --puzzle (81 characters)")
    from downstream import results

    if results.ranks()[0] != 0:
        return {}
    if config.puzzle is not None:
        return solve_one(config)
    from downstream.solver import load
    from pretrain.data.sudoku import readers

    began = time.monotonic()
    puzzles = readers.read(str(config.data))[: config.images]
    solver = load(config.ckpt, args=config.args, device=config.device, precision=config.precision)
    tally = score_set(solver, puzzles, config)
    out = results.folder_of(config.ckpt, TASK, out=out_dir or config.out, name=config.name)
    document = tally.document()
    path = results.write(out, TASK, config, protocol_of(config, solver, puzzles), **document, seconds=_since(began))
    draw(out, solver, puzzles, tally, config)
    print(table(document))
    print(f"written to {path}")
    return {**document, "path": str(path)}


def score_set(solver: Solver, puzzles: Puzzles, config: SudokuConfig) -> Tally:
    """Run all puzzles in blocks."""
    from downstream.rollout import roll_out
    from downstream.sudoku_scores import Tally

    tally = Tally(config.vote if solver.has_starts else (), config.finish)
    block = max(1, _PAIRS // config.starts)
    for first in range(0, len(puzzles), block):
        part = puzzles[first : first + block]
        rollouts = roll_out(
            solver,
            part.puzzles,
            steps=config.T,
            starts=config.starts,
            seed=config.seed,
            batch_size=config.batch_size,
            first=first,
            finish=config.finish,
        )
        tally.add(rollouts, part)
        print(f"{min(first + block, len(puzzles))} of {len(puzzles)} puzzles", file=sys.stderr, flush=True)
    return tally


def protocol_of(config: SudokuConfig, solver: Solver, puzzles: Puzzles) -> dict[str, Any]:
    """All that the scores depend on."""
    return {
        "data": config.data,
        "boards": len(puzzles),
        "givens": [int(puzzles.givens.min()), int(puzzles.givens.max())] if len(puzzles) else [],
        "solver": solver.description,
        "T": list(config.T),
        "starts": config.starts if solver.has_starts else 1,
        "votes": list(config.vote) if solver.has_starts else [],
        "finish": config.finish,
        "seed": config.seed,
        "correct": "all 81 cells; givens are put back into every answer",
        "precision": config.precision,
    }


def draw(out: Path, solver: Solver, puzzles: Puzzles, tally: Tally, config: SudokuConfig) -> None:
    """curves.png, energy.png and board.gif, where there is something to draw."""
    from downstream import board_pictures

    board_pictures.curves(out / "curves.png", tally.document())
    if solver.has_starts and not config.finish:
        board_pictures.energies(out / "energy.png", tally.energy[-1], tally.single[-1])
    if config.animate and solver.has_starts and len(solver.net.blocks) == 1:
        hits = tally.single[-1][:, 0]
        number = int(hits.argmax()) if hits.any() else 0
        board_pictures.animate(
            out / "board.gif", solver, puzzles.puzzles[number], puzzles.solutions[number],
            steps=min(max(config.T), 64), number=number, seed=config.seed,
        )  # fmt: skip


def table(document: dict[str, Any]) -> str:
    """The results as lines for the terminal."""

    def shown(entry: dict[str, Any]) -> str:
        low, high = entry["interval"]
        return f"{entry['accuracy']:5.1f}  [{low:.1f}, {high:.1f}]"

    lines = [f"boards solved (%), {document['by_steps'][0]['single']['boards']} puzzles, 95 % interval"]
    for entry in document["by_steps"]:
        lines.append(f"  T {entry['T']:<4d} one start      {shown(entry['single'])}")
        lines += [f"         {name:<14s} {shown(score)}" for name, score in entry["votes"].items()]
    if document["finish"]:
        lines.append(
            f"  first valid board: {shown(document['finish'])}, {document['finish']['mean_starts']:.1f} starts"
        )
    if document["auc"]:
        lines.append("  a right answer has the lower energy / higher confidence than a wrong one (AUC, same puzzle):")
        lines.append(
            "         " + "  ".join(f"{name} {value['within']:.2f}" for name, value in document["auc"].items())
        )
    return "\n".join(lines)


def solve_one(config: SudokuConfig) -> dict[str, Any]:
    """Solve the puzzle of the command line: print the board, whether it is valid, and how sure the network is."""
    from pretrain.data.sudoku import board, readers
    from pretrain.data.sudoku import solver as exact

    puzzle = board.parse(config.puzzle or "")
    count = int(exact.solve(puzzle[None], limit=2).counts[0])
    if count != 1:
        raise UserError(readers.explain(puzzle, count))
    from downstream.rollout import roll_out
    from downstream.solver import load

    solver = load(str(config.ckpt), args=config.args, device=config.device, precision=config.precision)
    rollouts = roll_out(
        solver, puzzle[None], steps=[max(config.T)], starts=config.starts, seed=config.seed,
        batch_size=config.batch_size, finish=config.finish,
    )  # fmt: skip
    answer, said = _answer(rollouts, config, has_starts=solver.has_starts)
    valid = bool(board.is_solved(answer[None])[0])
    print(board.grid(answer))
    print("valid: every row, column and box holds each digit once" if valid else "not valid: " + _problems(answer))
    print(
        f"{said['agree']} of {said['starts']} starts give this board; "
        f"mean probability of its digits {said['confidence']:.3f}"
    )
    return {"board": board.text(answer), "valid": valid, **said}


def _answer(rollouts: Rollouts, config: SudokuConfig, *, has_starts: bool) -> tuple[Any, dict[str, Any]]:
    """The chosen board of a single puzzle, and how sure the network is of it."""
    import numpy as np

    from downstream.voting import vote
    from pretrain.data.sudoku import board

    ran = np.flatnonzero(rollouts.ran[0])
    boards = rollouts.boards[-1, 0, ran]
    solved = np.flatnonzero(board.is_solved(boards))
    if config.finish and len(solved):
        answer = boards[solved[0]]
    elif has_starts and config.vote:
        answer = vote(rollouts, len(rollouts.steps) - 1, config.vote[0], starts=len(ran))[0]
    else:
        answer = boards[0]
    agree = (boards == answer).all(axis=1)
    confidence = rollouts.confidence[-1, 0, ran]
    mean = float(confidence[agree].mean() if agree.any() else confidence.mean())
    return answer, {"agree": int(agree.sum()), "starts": len(ran), "confidence": mean}


def _problems(answer: Any) -> str:
    from pretrain.data.sudoku import board

    found = board.conflicts(answer)
    return "; ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _since(began: float) -> float:
    return round(time.monotonic() - began, 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Score or solve from the command line."""
    run(parse(SudokuConfig, argv, description=__doc__ or "", config="solve_sudoku"))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
