"""Evaluations by two real processes: the results of one, also after one of the two was killed and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models import save_for_hf

import pretrain  # noqa: F401
from pretrain.data.shards import ShardWriter
from tests.test_object_discovery import png, squares

ROOT = Path(__file__).resolve().parents[1]
IMAGES, BATCH = 240, 4


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an export and labelled scenes."""
    folder = tmp_path_factory.mktemp("evaluated")
    torch.manual_seed(0)
    model = timm.create_model("akorn_nano_patch4_32", num_classes=0)
    save_for_hf(model, str(folder / "export"), model_args={}, safe_serialization=True)
    (folder / "scenes").mkdir()
    with ShardWriter(folder / "scenes" / "scenes-000000.tar") as writer:
        for number in range(IMAGES):
            image, mask = squares(number)
            parts = {"png": png(image), "instances.png": png(np.asarray(mask)), "cls": str(number % 2).encode()}
            writer.write(f"{number:04d}", parts)
    return folder


def start(work: Path, task: str, out: str, *, rank: int = 0, world_size: int = 1) -> subprocess.Popen[bytes]:
    data = str(work / "scenes")
    own = {
        "object_discovery": ["--data", data, "--preset", "tetrominoes", "--starts", "1", "--pictures", "0"],
        "linear_probe": ["--train", data, "--data", data, "--epochs", "2", "--rates", "0.1", "--knn", "5"],
    }[task]
    command = [sys.executable, f"downstream/{task}.py", "--ckpt", str(work / "export"), "--out", str(work / out), *own]
    ranks = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, "--batch-size", str(BATCH)], cwd=ROOT, env={**os.environ, **ranks})


def scores(work: Path, out: str) -> Any:
    return json.loads((work / out / "results.json").read_text())["models"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "begun"), [("object_discovery", ".parts/*/block_*.json"), ("linear_probe", "features/*/columns.json")]
)
def test_two_processes_give_the_results_of_one_although_one_is_killed(work: Path, task: str, begun: str) -> None:
    assert start(work, task, f"{task}-alone").wait(timeout=900) == 0
    first, other = (start(work, task, f"{task}-both", rank=rank, world_size=2) for rank in (0, 1))
    try:
        deadline = time.monotonic() + 300
        while not list((work / f"{task}-both").glob(begun)) and other.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        other.send_signal(signal.SIGKILL)
        other.wait()
        other = start(work, task, f"{task}-both", rank=1, world_size=2)
        assert other.wait(timeout=900) == 0
        assert first.wait(timeout=900) == 0
    finally:
        for process in (first, other):
            process.kill()
    assert scores(work, f"{task}-both") == scores(work, f"{task}-alone")
