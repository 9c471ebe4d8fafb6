"""The Sudoku task: its loss in closed form, its independence of chunks, and that it learns."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from configs.errors import UserError
from configs.schema import PretrainConfig
from pretrain.data.batch import Batch
from pretrain.data.sudoku import generator
from pretrain.tasks import make_task
from pretrain.tasks.sudoku import Sudoku, make_model

ARGUMENTS = {"embed_dim": 16, "num_heads": 2, "num_steps": 3}


def config_of(**changes: Any) -> PretrainConfig:
    values = {
        "name": "test",
        "batch_size": 4,
        "steps": 1,
        "task": {"name": "sudoku"},
        "model": {"name": "sudoku_akorn", "args": ARGUMENTS},
        "data": {"shards": "nowhere"},
    }
    return PretrainConfig.model_validate({**values, **changes})


def batch_of(count: int, *, seed: int = 0, givens: tuple[int, int] = (70, 76)) -> Batch:
    made = generator.generate(count, seed=seed, givens=givens)
    numbers = torch.arange(count)
    tensors = {"puzzle": torch.from_numpy(made.puzzles), "solution": torch.from_numpy(made.solutions)}
    return Batch(tensors, numbers, torch.zeros(count, dtype=torch.int64), numbers, seed)


def test_loss_in_closed_form() -> None:
    task, batch = Sudoku(config_of()), batch_of(3)
    loss, metrics = task.loss(torch.zeros(3, 81, 9), batch)
    assert loss.item() == pytest.approx(math.log(9))
    perfect = torch.nn.functional.one_hot(batch.tensors["solution"].long() - 1, 9).float() * 100
    loss, metrics = task.loss(perfect, batch)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert metrics["cells"].item() == metrics["boards"].item() == 1
    blank = int(np.flatnonzero(batch.tensors["puzzle"][0].numpy() == 0)[0])
    given = int(np.flatnonzero(batch.tensors["puzzle"][1].numpy())[0])
    wrong = perfect.clone()
    wrong[0, blank] = wrong[0, blank].roll(1)
    wrong[1, given] = wrong[1, given].roll(1)  # givens do not count
    _, metrics = task.loss(wrong, batch)
    blanks = int((batch.tensors["puzzle"][0] == 0).sum())
    assert metrics["boards"].item() == pytest.approx(2 / 3)
    assert metrics["cells"].item() == pytest.approx((2 + 1 - 1 / blanks) / 3)


@pytest.mark.parametrize("name", ["sudoku_akorn", "sudoku_itrsa", "sudoku_transformer"])
def test_embeddings_depend_on_the_sample_alone(name: str) -> None:
    torch.manual_seed(0)
    task = make_task(config_of(model={"name": name, "args": ARGUMENTS}))
    task.module.train()
    batch = batch_of(4)
    whole = task.embed(batch)
    parts = torch.cat([task.embed(batch[:1]), task.embed(batch[1:])])
    assert whole.shape == (4, 81, 9)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)
    losses = [task.loss(whole[cut], batch[cut])[0] for cut in (slice(0, 1), slice(1, 4))]
    assert (losses[0] / 4 + losses[1] * 3 / 4).item() == pytest.approx(task.loss(whole, batch)[0].item(), rel=1e-5)


def test_it_learns() -> None:
    torch.manual_seed(0)
    task, batch = Sudoku(config_of()), batch_of(24)
    optimizer = torch.optim.Adam(task.module.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss, metrics = task.loss(task.embed(batch), batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(9), rel=0.2)
    # Givens alone (73 of 81 cells) are worth a loss below 8/81 log 9 = .22.
    assert losses[-1] < 0.6 * losses[0]
    assert metrics["cells"].item() > 0.13


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="does not fit task sudoku"):
        config_of(model={"name": "resnet18"})
    with pytest.raises(ValueError, match="did you mean 'sudoku_akorn'"):
        config_of(model={"name": "sudoku_akron"})
    with pytest.raises(UserError, match="solves no Sudoku"):
        make_model("resnet18", {})
    with pytest.raises(UserError, match="heads"):
        make_model("sudoku_akorn", {"heads": 3})
