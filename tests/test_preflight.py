"""Checks before the queue: each failed one names its remedy."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cluster import memory, preflight, slurm
from cluster.plan import plan_of
from cluster.preflight import Check, make_command, shards_check
from cluster.resources import Resources
from configs import PretrainConfig, UserError
from configs.cluster import Cluster
from pretrain.make_shards import KINDS


def config(**changes: object) -> PretrainConfig:
    base = {
        "name": "r",
        "batch_size": 64,
        "steps": 2,
        "model": {"name": "akorn_base_patch16_256"},
        "data": {"shards": "nowhere"},
        "views": {"size": 256},
    }
    return PretrainConfig.model_validate_json(json.dumps({**base, **changes}))


def test_shards_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for number in range(3):
        (tmp_path / "set" / f"a-{number:03d}.tar").touch()
    assert shards_check("k", str(tmp_path / "set")).level == "ok"
    assert shards_check("k", f"{tmp_path}/set/a-{{000..002}}.tar").level == "ok"
    assert shards_check("k", f"{tmp_path}/set/b-{{000..002}}.tar").level == "error"
    assert shards_check("k", "s3://bucket/set-{000..002}.tar").level == "ok"
    (tmp_path / "satnet").mkdir()
    (tmp_path / "satnet" / "features.pt").touch()
    assert shards_check("k", str(tmp_path / "satnet")).level == "ok"
    assert "is an empty list" in shards_check("k", []).text
    assert "wildcards as in *.tar are not expanded" in shards_check("k", f"{tmp_path}/set/*.tar").text


def test_a_folder_one_too_high_is_pointed_out(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.tar").touch()
    assert "did you mean" in shards_check("k", str(tmp_path)).text


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("data/imagenet/val", "imagenet IMAGENET_FOLDER data/imagenet"),
        ("/shards/imagenet", "imagenet IMAGENET_FOLDER /shards/imagenet"),
        ("data/cifar10/train", "cifar10 CIFAR10_ARCHIVE data/cifar10"),
        ("data/tetrominoes/train", "tetrominoes data/tetrominoes/train --count 20000"),
        ("data/tetrominoes/test", "tetrominoes data/tetrominoes/test --count 320 --seed 1"),
        ("data/dsprites/test", "multi-dsprites data/dsprites/test --count 320 --seed 1"),
        ("data/sudoku/test", "sudoku data/sudoku/test --count 1000 --seed 1"),
        ("photos", "folder IMAGE_FOLDER photos"),
    ],
)
def test_the_command_that_makes_a_set(path: str, command: str) -> None:
    assert make_command(path) == f"python pretrain/make_shards.py {command}"
    kind, *paths = command.partition(" --")[0].split()
    assert len(paths) == 1 + KINDS[kind].has_input


def test_the_first_missing_set_is_told_in_full_and_the_others_by_name() -> None:
    chain = [{"job": "linear_probe", "train": "nowhere/train", "data": "nowhere/val"}]
    with pytest.raises(UserError) as caught:
        preflight.stop_on_errors(preflight.missing_data(config(downstream=chain)))
    first, second = str(caught.value).splitlines()
    assert "no shards at nowhere (missing as well: downstream.0.train, downstream.0.data)" in first
    assert "make them: python pretrain/make_shards.py" in second


def test_a_file_in_the_place_of_the_runs(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    (check,) = preflight.home_checks(config(), tmp_path / "runs" / "r")
    assert "runs is a file; choose another place" in check.text


def test_what_a_training_would_not_do(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text('{"samples": 63}')
    wanted = config(data={"shards": str(tmp_path)}, monitor={"wandb": "project"})
    plan = plan_of(wanted, Resources("local", 1, 1, 0, 1, Cluster()))
    found = {check.level: check.text for check in preflight.training_checks(wanted, plan)}
    assert "pip install wandb" in found["error"]
    assert "batch_size=64 is more than the 63 samples" in found["warning"]


def test_a_full_disk_is_an_error_with_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: os.terminal_size((0, 0)) and _Usage(2**20))
    found = list(preflight.home_checks(config(), tmp_path / "runs" / "r"))
    assert [check.level for check in found] == ["ok", "error"]
    assert "checkpoints.keep_last=1" in found[1].text


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free


def test_too_much_memory_for_the_gpu_names_a_micro_batch() -> None:
    big = config(batch_size=4096, model={"name": "akorn_large_patch16_256"})
    here = Resources("slurm", 1, 8, 8, 8, Cluster(gpu_type="a100"))
    check = preflight.memory_check(big, plan_of(big, here), here)
    assert check.level == "warning"
    micro = int(check.text.split("compute.micro_batch=")[1].split(" ")[0])
    smaller = config(batch_size=4096, model={"name": "akorn_large_patch16_256"}, compute={"micro_batch": micro})
    estimate = memory.estimate_gib(smaller, plan_of(smaller, here), here)
    assert estimate is not None
    assert estimate < memory.GPU_GIB["a100"]


def slurm_levels(monkeypatch: pytest.MonkeyPatch, cluster: Cluster, **given: int) -> list[Check]:
    part = slurm.Partition("a", True, 60, 4, 64, 256_000, {"a100": 4})
    monkeypatch.setattr(slurm, "partitions", lambda name: [part] if name in (None, "a") else [])
    monkeypatch.setattr(slurm, "names_of_partitions", lambda: ["a"])
    here = Resources("slurm", given.get("nodes", 1), 4, given.get("gpus", 4), 8, cluster)
    return [check for check in preflight.slurm_checks(here) if check.level != "ok"]


def test_the_partitions_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    fitting = Cluster(time_min=60)
    assert slurm_levels(monkeypatch, fitting) == []
    (nodes,) = slurm_levels(monkeypatch, fitting, nodes=5)
    assert "cluster.nodes=5, but partition a has 4" in nodes.text
    (gpus,) = slurm_levels(monkeypatch, fitting, gpus=8)
    assert "cluster.gpus=8" in gpus.text
    (kind,) = slurm_levels(monkeypatch, Cluster(time_min=60, gpu_type="h100"))
    assert kind.text == "cluster.gpu_type=h100, but partition a has a100"
    (limit,) = slurm_levels(monkeypatch, Cluster(time_min=61))
    assert "cluster.time_min=60" in limit.text
    (unknown,) = slurm_levels(monkeypatch, Cluster(time_min=60, partition="b"))
    assert "it has: a" in unknown.text


def test_versions_are_those_of_the_requirements() -> None:
    (check,) = preflight.version_checks()
    assert check.level == "ok"


@pytest.mark.parametrize(("processes", "gpus", "refused"), [(2, 1, True), (4, 4, False), (2, 0, False)])
def test_two_processes_of_a_training_on_one_gpu_are_refused(processes: int, gpus: int, refused: bool) -> None:
    found = preflight.gpu_checks(Resources("local", 1, processes, gpus, 8, Cluster()))
    assert [check.level for check in found] == (["error"] if refused else [])
    assert all(f"cluster.processes={gpus}" in check.text for check in found)
