"""Whole runs of the stand-in task, in this process or in many.

Owns: a configuration of a few hundred parameters, and the seams through which task and loader are replaced. Faults are
put in by environment variables, so that subprocesses of tests and of the chaos run can be told.
"""

from __future__ import annotations

import json
import os
import signal
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.schema import PretrainConfig
from pretrain.data.batch import Batch
from pretrain.data.decode import BrokenImageError
from pretrain.data.fetch import Work
from pretrain.data.loader import Loader
from pretrain.data.shards import ShardWriter
from pretrain.distributed import Ranks, once
from tests.standin import WIDTH, Contrast, Regress, VectorLoader

SETTINGS: dict[str, Any] = {
    "name": "standin",
    "batch_size": 16,
    "steps": 30,
    "model": {"name": "resnet18"},
    "data": {"shards": "none"},
    "views": {"size": 8},
    "optimizer": {"lr": 1e-2, "weight_decay": 0.1, "clip": 0.5},
    "schedule": {"name": "cosine", "warmup_steps": 3},
    "ema": {"decay": 0.9, "every": 2, "start": 4},
    "compute": {"precision": "fp32", "compile": False},
    "checkpoints": {"save_every": 10},
    "monitor": {"log_every": 5, "tensorboard": False},
}


def settings(**changes: Any) -> PretrainConfig:
    """The stand-in's configuration; keyword arguments replace keys, merging sections."""
    values = json.loads(json.dumps(SETTINGS))
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return PretrainConfig.model_validate_json(json.dumps(values))


class Faulty:
    """What is wrong with batches: NaN at the numbers in STANDIN_NAN (a list "3,4"); STANDIN_STEP_S makes each wait."""

    rank: int
    world_size: int

    def spoiled(self, step: int, batch: Batch) -> Batch:
        time.sleep(float(os.environ.get("STANDIN_STEP_S", "0")))
        bad = {int(number) for number in os.environ.get("STANDIN_NAN", "").split(",") if number}
        if step in bad and self.rank == self.world_size - 1:
            batch.tensors["images"] = batch.tensors["images"].clone()
            batch.tensors["images"][0] = torch.nan
        return batch


class FaultyLoader(Faulty, VectorLoader):
    """Vectors from nowhere."""

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, step: int) -> Batch:
        return self.spoiled(step, super().__getitem__(step))


class FaultyShards(Faulty, Loader):
    """Vectors from a shard set, through the real loader."""

    def __getitem__(self, step: int) -> Batch:
        return self.spoiled(step, super().__getitem__(step))


class Vectors:
    """A transform: the part `vec`, float32 with a checksum behind it."""

    def draws(self, epochs: np.ndarray, samples: np.ndarray) -> np.ndarray:
        return samples

    def __call__(self, parts: Mapping[str, Any], draws: np.ndarray) -> Work:
        content = parts.get("vec", b"")
        if len(content) != 4 * WIDTH + 4 or zlib.crc32(content[:-4]) != int.from_bytes(content[-4:], "little"):
            raise BrokenImageError("checksum of a vector")
        return lambda: {"images": np.frombuffer(content[:-4], np.float32)}


def write_vectors(folder: Path, *, shards: int = 8, each: int = 8) -> None:
    """A shard set of vectors for `Vectors`."""
    folder.mkdir(parents=True)
    vectors = VectorLoader(num_samples=shards * each).vectors.numpy()
    for shard in range(shards):
        with ShardWriter(folder / f"vectors-{shard:03d}.tar") as writer:
            for number in range(shard * each, (shard + 1) * each):
                content = vectors[number].tobytes()
                writer.write(f"vector_{number:04d}", {"vec": content + zlib.crc32(content).to_bytes(4, "little")})


@dataclass(frozen=True)
class Looker:
    """An observer that gives the sum of the weights it sees, after drawing random numbers; or has a `fault`."""

    every: int
    fault: str = ""

    def observe(self, backbone: Any, config: PretrainConfig, device: torch.device) -> dict[str, float]:
        torch.randn(100)
        if self.fault == "raise":
            raise ValueError("as asked")
        if self.fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return {"sum": sum(float(tensor.double().sum()) for tensor in backbone.state_dict().values())}


@dataclass(frozen=True)
class Slow:
    """An observer that takes its time."""

    every: int
    seconds: float

    def observe(self, backbone: Any, config: PretrainConfig, device: torch.device) -> dict[str, float]:
        time.sleep(self.seconds)
        return {"slow": 1.0}


def replace_seams(*, separable: bool = False) -> None:
    """Put the stand-ins in place of task and loader, in this process."""
    import pretrain.checkpoint
    import pretrain.session
    import pretrain.tasks

    def make_task(config: PretrainConfig) -> Any:
        return (Regress if separable else Contrast)(config.seed)

    def make_loader(config: PretrainConfig, task: Any, run_dir: Path, ranks: Ranks) -> Any:
        place = {"batch_size": config.batch_size, "rank": ranks.rank, "world_size": ranks.world_size}
        if config.data.shards == "none":
            return FaultyLoader(**place, seed=config.seed)
        more: dict[str, Any] = {"ledger": run_dir / "skipped.jsonl", "once": partial(once, ranks=ranks)}
        return FaultyShards(config.data, config.loading, Vectors(), **place, seed=config.seed, **more)

    if os.environ.get("STANDIN_DISK_FULL"):
        pretrain.checkpoint.write_tensors = _full_disk
    pretrain.tasks.make_task = make_task
    pretrain.session.make_task = make_task
    pretrain.session._make_loader = make_loader


def _full_disk(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    path.write_bytes(b"part of a file")
    raise OSError(28, "No space left on device")


def run_standin(run_dir: str | Path, changes: dict[str, Any] | None = None, observers: Sequence[Any] = ()) -> str:
    """Run the stand-in on this rank; returns the status."""
    from pretrain.train import run

    changes = dict(changes or {})
    replace_seams(separable=changes.pop("separable", False))
    return run(settings(**changes), run_dir=Path(run_dir), observers=observers).status


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl holds."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def events(run_dir: Path) -> list[dict[str, Any]]:
    """What events.jsonl holds."""
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


def final_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """Weights of the newest whole checkpoint."""
    from pretrain import checkpoint

    path = checkpoint.newest(run_dir)
    assert path is not None
    return checkpoint.load(path).tensors["weights"]


if __name__ == "__main__":
    import sys

    print(run_standin(sys.argv[1], json.loads(sys.argv[2])))
