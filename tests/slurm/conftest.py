"""Fixtures of the tests on a real SLURM: the cluster, a tiny training, and an undisturbed run of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.submission import Outcome, Submission, latest
from tests.slurm import nodes

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 60
# Four processes that import torch on two busy cores take minutes to start.
PATIENCE_S = 600.0
TINY = f"""
name: tiny
batch_size: 16
steps: {STEPS}
model: {{name: akorn_nano_patch4_32, args: {{embed_dim: 16, num_heads: 2, num_steps: 2, img_size: 16}}}}
data: {{shards: shards, keep: memory}}
loading: {{workers: 0}}
views: {{size: 16}}
optimizer: {{name: adam, lr: 1.0e-3}}
ema: {{decay: 0.9, every: 1, start: 0}}
compute: {{precision: fp32, compile: false, zero_stage: 1}}
checkpoints: {{save_every: 10}}
monitor: {{log_every: 1, tensorboard: false}}
cluster: {{executor: slurm, nodes: 2, processes: 2, gpus: 0, time_min: 60}}
"""


@dataclass(frozen=True)
class Desk:
    """A folder from which jobs are launched, as a user does it."""

    folder: Path
    patience_s: float = PATIENCE_S

    def launch(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `python cluster/launch.py ...` here."""
        command = [sys.executable, str(REPOSITORY / "cluster" / "launch.py"), *arguments]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=3 * self.patience_s)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def make_shards(self, *arguments: str) -> None:
        """Run `python pretrain/make_shards.py ...` here."""
        command = [sys.executable, str(REPOSITORY / "pretrain" / "make_shards.py"), *arguments]
        subprocess.run(command, cwd=self.folder, check=True, capture_output=True, timeout=self.patience_s)

    def home(self, name: str) -> Path:
        return self.folder / "runs" / name

    def training(self, name: str) -> Submission:
        return latest(self.home(name))["pretrain"]

    def job_id(self, name: str) -> str:
        record = self.training(name).record()
        assert record is not None
        return record.job_id

    def rows(self, name: str) -> list[dict[str, float]]:
        """Whole rows of the run's metrics."""
        path = self.home(name) / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def await_step(self, name: str, step: int) -> None:
        nodes.wait_for(f"step {step} of {name}", lambda: len(self.rows(name)) >= step, self.patience_s)

    def await_end(self, name: str, link: str = "pretrain") -> Outcome:
        submission = latest(self.home(name))[link]
        nodes.wait_for(f"the end of {name}", lambda: submission.outcome() is not None, 3 * self.patience_s)
        outcome = submission.outcome()
        assert outcome is not None
        return outcome


@pytest.fixture(scope="session")
def slurm() -> Iterator[None]:
    """A cluster of this test run alone, started afresh and stopped at the end."""
    reason = nodes.why_not()
    if reason is not None:
        pytest.skip(reason)
    with nodes.reserved() as is_free:
        if not is_free:
            pytest.skip(f"another test run has the SLURM of this machine ({nodes.LOCK})")
        trouble = nodes.start()
        if trouble is None:
            os.environ.update(nodes.environment())
            yield
        nodes.stop()
    if trouble is not None:
        pytest.skip(trouble)


@pytest.fixture(scope="session")
def desk(slurm: None, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """A folder with shards and the tiny training's configuration."""
    folder = tmp_path_factory.mktemp("desk")
    made = Desk(folder)
    made.make_shards("tetrominoes", "shards", "--count", "64")
    (folder / "tiny.yaml").write_text(TINY)
    return made


@pytest.fixture(scope="session")
def undisturbed(desk: Desk) -> Path:
    """The tiny training's run when nothing happens to it."""
    desk.launch("tiny.yaml", "name=undisturbed")
    return desk.home("undisturbed")


@pytest.fixture
def healed(desk: Desk) -> Iterator[None]:
    """Afterwards all nodes are in order."""
    yield
    nodes.heal()


def begin(desk: Desk, name: str, *overrides: str) -> str:
    """Submit the training and wait until it is well under way. Returns the job id."""
    desk.launch("tiny.yaml", f"name={name}", *overrides, "--detach")
    desk.await_step(name, 15)
    return desk.job_id(name)


def check(desk: Desk, name: str, undisturbed: Path, *, lives: int = 2) -> None:
    """The run finished, has each step once, and ended with the same weights."""
    outcome = desk.await_end(name)
    assert outcome.status == "finished", outcome
    assert [row["step"] for row in desk.rows(name)] == list(range(1, STEPS + 1))
    last = desk.training(name).lives()[-1]["generation"]
    assert last >= desk.training(name).generation(lives - 1)
    assert _tensors_of(desk.home(name)) == _tensors_of(undisturbed)


def _tensors_of(home: Path) -> dict[str, bytes]:
    """Weights, averages and moments of the last checkpoint, and the export, byte for byte."""
    files = sorted((home / "checkpoints" / f"step_{STEPS:08d}").glob("*.safetensors"))
    assert files
    return {path.name: path.read_bytes() for path in [*files, home / "export" / "model.safetensors"]}
