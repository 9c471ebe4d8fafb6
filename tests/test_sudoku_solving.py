"""downstream/sudoku.py from the command line: a set, a single puzzle, and the errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from configs.errors import UserError
from downstream import sudoku
from downstream.rollout import roll_out
from downstream.solver import load
from pretrain.data.sudoku import board, generator
from pretrain.tasks.sudoku import make_model
from pretrain.tensorfile import write_tensors
from tests.test_sudoku_board import PUZZLE, SOLUTION

ARGUMENTS = {"embed_dim": 16, "num_heads": 2, "num_steps": 4}


@pytest.fixture(scope="module", params=["sudoku_akorn", "sudoku_itrsa"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "export"
    folder.mkdir()
    torch.manual_seed(0)
    write_tensors(folder / "model.safetensors", make_model(request.param, ARGUMENTS).state_dict())
    described = {"architecture": request.param, "model_args": ARGUMENTS, "task": "sudoku"}
    (folder / "config.json").write_text(json.dumps(described))
    return folder


@pytest.fixture(scope="module")
def puzzles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = generator.generate(6, seed=0, givens=(70, 75))
    path = tmp_path_factory.mktemp("puzzles") / "puzzles.txt"
    # The last one is full: any network has it right.
    path.write_text("\n".join([*map(board.text, made.puzzles[:5]), board.text(made.solutions[5])]))
    return path


def test_the_precision_asked_for_is_the_one_of_the_products(exported: Path) -> None:
    made = generator.generate(3, seed=0, givens=(30, 40))
    exact, rounded = (
        roll_out(load(str(exported), precision=precision), made.puzzles, steps=[4], starts=2, seed=0, batch_size=4)
        for precision in ("fp32", "bf16")
    )
    assert not np.array_equal(exact.confidence, rounded.confidence)
    np.testing.assert_allclose(rounded.confidence, exact.confidence, rtol=0.02)


def test_a_set_is_scored(exported: Path, puzzles: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--ckpt", str(exported), "--data", str(puzzles), "--T", "2", "6", "--starts", "3"]
    assert sudoku.main([*arguments, "--out", str(tmp_path), "--batch-size", "4"]) == 0
    document = json.loads((tmp_path / "results.json").read_text())
    akorn = "akorn" in str(exported)
    assert [entry["T"] for entry in document["by_steps"]] == [2, 6]
    assert document["by_steps"][0]["single"]["boards"] == 6
    assert document["by_steps"][0]["single"]["accuracy"] >= 100 / 6 - 1e-3
    assert set(document["by_steps"][1]["votes"]) == ({"energy", "energy-sum", "majority", "c-vote"} if akorn else set())
    assert document["by_givens"]["81"]["accuracy"] == 100
    assert document["protocol"]["starts"] == (3 if akorn else 1)
    assert (tmp_path / "curves.png").stat().st_size > 5000
    if akorn:
        with Image.open(tmp_path / "board.gif") as film:
            assert film.n_frames == 6
    assert "boards solved (%), 6 puzzles" in capsys.readouterr().out


def test_finishing_is_scored(exported: Path, puzzles: Path, tmp_path: Path) -> None:
    arguments = ["--ckpt", str(exported), "--data", str(puzzles), "--T", "2", "--starts", "4", "--finish"]
    assert sudoku.main([*arguments, "--out", str(tmp_path), "--images", "6", "--no-animate"]) == 0
    finish = json.loads((tmp_path / "results.json").read_text())["finish"]
    assert finish["boards"] == 6
    assert 1 <= finish["mean_starts"] <= 4
    assert not (tmp_path / "board.gif").exists()


def test_a_single_puzzle(exported: Path, capsys: pytest.CaptureFixture) -> None:
    assert sudoku.main(["--ckpt", str(exported), "--puzzle", SOLUTION, "--T", "2", "--starts", "3"]) == 0
    said = capsys.readouterr().out
    assert board.grid(board.parse(SOLUTION)) in said
    assert "valid: every row" in said
    assert ("3 of 3 starts" if "akorn" in str(exported) else "1 of 1 starts") in said
    assert sudoku.main(["--ckpt", str(exported), "--puzzle", PUZZLE, "--T", "2", "--starts", "2", "--vote"]) == 0
    assert "not valid: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--puzzle", "12"], "a board has 81 cells, this has 2"),
        (["--puzzle", "x" * 81], "is no digit"),
        (["--puzzle", "." * 81], "several solutions"),
        (["--puzzle", "11" + "." * 79], "no solution: 1 stands twice in row 1"),
        (["--data", "/nowhere.txt"], "no such file"),
        ([], "nothing to solve"),
    ],
)
def test_errors_say_what_to_do(arguments: list[str], message: str, exported: Path) -> None:
    with pytest.raises(UserError, match=message):
        sudoku.main(["--ckpt", str(exported), *arguments])


def test_what_is_no_solver_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run, export or weights file"):
        load(str(tmp_path / "nothing"))
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
    with pytest.raises(UserError, match="solves no Sudoku"):
        load(str(tmp_path))
