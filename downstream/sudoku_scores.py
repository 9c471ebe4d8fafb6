"""The tally of a Sudoku evaluation: filled block by block, read as the results.

Shapes: P puzzles, S starts, M numbers of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from downstream import voting
from downstream.rollout import Rollouts
from pretrain.data.sudoku import board
from pretrain.data.sudoku.generator import Puzzles


class Tally:
    """What is kept of the answers: which are right, their energies and confidences, and what each vote chose.

    Attributes:
        single: whether each start's board is right [M, P, S]; energy, energy_sum, confidence likewise.
    """

    def __init__(self, votes: Sequence[str], finish: bool) -> None:
        self.votes, self.finish = tuple(votes) if not finish else (), finish
        self.steps: tuple[int, ...] = ()
        self._parts: dict[str, list[NDArray]] = {}

    def add(self, rollouts: Rollouts, puzzles: Puzzles) -> None:
        """Take over the answers to a block of puzzles."""
        self.steps = rollouts.steps
        self._append("single", voting.right(rollouts.boards, puzzles.solutions[:, None]) & rollouts.ran)
        self._append("energy", rollouts.energy)
        self._append("energy_sum", rollouts.energy_sum)
        self._append("confidence", rollouts.confidence)
        self._append("ran", rollouts.ran[None])
        self._append("givens", puzzles.givens[None])
        for name in self.votes:
            for place in range(len(self.steps)):
                for starts in self._counts(rollouts, place):
                    chosen = voting.vote(rollouts, place, name, starts=starts)
                    self._append(f"{name} {place} {starts}", voting.right(chosen, puzzles.solutions)[None])
        if self.finish:
            valid = board.is_solved(rollouts.boards[-1].reshape(-1, 81)).reshape(rollouts.ran.shape) & rollouts.ran
            self._append("finished", np.expand_dims(valid.any(axis=1), 0))

    def _counts(self, rollouts: Rollouts, place: int) -> list[int]:
        """At which numbers of starts a vote is read: all powers of two at the last number of steps, else all starts."""
        most = rollouts.ran.shape[1]
        return voting.powers_of_two(most) if place == len(self.steps) - 1 else [most]

    def _append(self, name: str, values: NDArray) -> None:
        self._parts.setdefault(name, []).append(values)

    def _all(self, name: str) -> NDArray:
        return np.concatenate(self._parts[name], axis=1)

    @property
    def single(self) -> NDArray[np.bool_]:
        """Whether each start's board is right [M, P, S]."""
        return self._all("single")

    @property
    def energy(self) -> NDArray[np.float32]:
        """Last energies [M, P, S]."""
        return self._all("energy")

    def document(self) -> dict[str, Any]:
        """The results, ready for JSON."""
        starts = self.single.shape[2]
        last = len(self.steps) - 1
        by_starts = {
            name: [
                {"starts": count, **voting.score(self._all(f"{name} {last} {count}")[0])}
                for count in voting.powers_of_two(starts)
            ]
            for name in self.votes
        }
        best = self._all(f"{self.votes[0]} {last} {starts}")[0] if self.votes else self._first_right()
        return {
            "by_steps": [self._at(place, starts) for place in range(len(self.steps))],
            "by_starts": by_starts,
            "by_givens": voting.by_givens(best, self._all("givens")[0]),
            "finish": self._finish() if self.finish else None,
            "auc": self._auc() if self.votes else {},
        }

    def _first_right(self) -> NDArray[np.bool_]:
        return self.single[-1].any(axis=1) if self.finish else self.single[-1][:, 0]

    def _at(self, place: int, starts: int) -> dict[str, Any]:
        """Scores at one number of steps. `single` counts the first start; `mean` averages over all that ran."""
        ran = self._all("ran")[0]
        votes = {name: voting.score(self._all(f"{name} {place} {starts}")[0]) for name in self.votes}
        mean = 100 * float(self.single[place][ran].mean())
        return {"T": self.steps[place], "single": voting.score(self.single[place][:, 0]), "mean": mean, "votes": votes}

    def _finish(self) -> dict[str, Any]:
        """How many puzzles got a valid board, and how many starts were run for one."""
        return {
            **voting.score(self._all("finished")[0]),
            "mean_starts": float(self._all("ran")[0].sum(axis=1).mean()),
        }

    def _auc(self) -> dict[str, dict[str, float]]:
        """How well energies (lower) and confidence (higher) tell right from wrong, over all and within a puzzle."""
        correct = self.single[-1]
        scores = {
            "energy": -self._all("energy")[-1],
            "energy-sum": -self._all("energy_sum")[-1],
            "confidence": self._all("confidence")[-1],
        }
        return {
            name: {
                "all": voting.auc(values.ravel(), correct.ravel()),
                "within": voting.auc_within(values, correct),
            }
            for name, values in scores.items()
        }
