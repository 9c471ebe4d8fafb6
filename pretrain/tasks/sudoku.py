"""Solving Sudoku: cross-entropy over all 81 cells, as published (arXiv 2410.13821, section 5.2).

Owns: the task, and building a solver from its name. Three models compare: AKOrN, ItrSA and a transformer
(pretrain/models/sudoku.py). The initial oscillators are keyed by the sample, as everywhere.

Legend: b boards, C channels; digits 0 (blank) to 9, classes 0 to 8.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import PretrainConfig
from configs.tasks import SudokuTask
from pretrain.data.sudoku.transform import SudokuTransform
from pretrain.models.sudoku import SudokuNet

if TYPE_CHECKING:
    from pretrain.data.batch import Batch

PREFIX = "sudoku_"


class Sudoku:
    """The task: see pretrain/tasks/__init__.py for what the trainer asks of it."""

    separable = True

    def __init__(self, config: PretrainConfig) -> None:
        assert isinstance(config.task, SudokuTask)
        solver = make_model(config.model.name, config.model.args)
        self.module: nn.Module = solver
        self.backbone: nn.Module = solver
        self.transform = SudokuTransform(config.seed, symmetries=config.task.symmetries)
        self._start_shape = solver.start_shape() if solver.kind == "akorn" else None

    def embed(self, batch: Batch) -> Tensor:
        """Logits [b, 81, 9]."""
        digits = batch.tensors["puzzle"].long()
        start = None if self._start_shape is None else batch.starts(self._start_shape)
        return self.module(digits, start)

    def loss(self, embeddings: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy over all cells; shares of blank cells and of whole boards that are right."""
        target = batch.tensors["solution"].long() - 1
        loss = F.cross_entropy(embeddings.float().flatten(0, 1), target.flatten())
        with torch.no_grad():
            right = embeddings.argmax(2) == target
            blank = batch.tensors["puzzle"] == 0
            # Per board first: the trainer averages over chunks by their number of boards.
            cells = (right & blank).sum(1) / blank.sum(1).clamp_min(1)
            boards = (right | ~blank).all(1).float()
        return loss, {"cells": cells.mean(), "boards": boards.mean()}


def make_model(name: str, arguments: dict[str, Any]) -> SudokuNet:
    """A solver by its name, `sudoku_akorn`, `sudoku_itrsa` or `sudoku_transformer`, with fresh weights.

    Raises:
        UserError: another name, or arguments that do not fit.
    """
    if not name.startswith(PREFIX):
        raise UserError(f"model.name={name} solves no Sudoku; there are sudoku_akorn, sudoku_itrsa, sudoku_transformer")
    try:
        return SudokuNet(kind=name.removeprefix(PREFIX), **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"model.name={name} with model.args={arguments}: {error}") from error
