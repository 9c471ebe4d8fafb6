"""Links of a run: what they are, what they wait for, which run again. Also snapshots."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster import chain, snapshot
from cluster.state import State
from cluster.submission import Record, Submission, new_submission
from configs import LinearProbeConfig, PretrainConfig, dump
from configs.cluster import Cluster


def config(**changes: object) -> PretrainConfig:
    base = {
        "name": "r",
        "batch_size": 64,
        "steps": 2,
        "model": {"name": "akorn_base_patch16_256"},
        "data": {"shards": "here"},
        "views": {"size": 256},
        "cluster": {"nodes": 4, "gpus": 8, "partition": "big", "account": "me"},
        "downstream": [
            {"job": "object_discovery"},
            {"job": "linear_probe", "cluster": {"partition": "small"}},
            {"job": "linear_probe"},
        ],
    }
    return PretrainConfig.model_validate_json(json.dumps({**base, **changes}))


def test_side_by_side_on_slurm_and_in_sequence_here() -> None:
    side = chain.links(config(), Path("/runs/r"), in_sequence=False)
    assert [link.name for link in side] == ["pretrain", "object_discovery", "linear_probe", "linear_probe_2", "report"]
    assert [link.after for link in side[1:4]] == [(), (), ()]
    assert side[4].after == ("object_discovery", "linear_probe", "linear_probe_2")
    sequence = chain.links(config(), Path("/runs/r"), in_sequence=True)
    assert [link.after for link in sequence[1:4]] == [(), ("object_discovery",), ("linear_probe",)]
    assert all(link.needs == ("pretrain",) for link in sequence[1:])


def test_evaluations_look_at_the_run_on_one_node_of_its_resources() -> None:
    link = chain.links(config(), Path("/runs/r"), in_sequence=False)[2]
    assert isinstance(link.config, LinearProbeConfig)
    assert link.config.ckpt == "/runs/r"
    assert link.config.out == "/runs/r/downstream/linear_probe"
    cluster = link.cluster
    assert (cluster.nodes, cluster.processes, cluster.gpus) == (1, 1, 1)
    assert (cluster.partition, cluster.account) == ("small", "me")


def test_folders_of_evaluations(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "r"
    run.mkdir(parents=True)
    (run / "config.yaml").touch()

    def home(ckpt: str) -> Path:
        return chain.home_of(LinearProbeConfig(ckpt=ckpt))

    assert home(str(run)) == run
    assert home("vit_base_patch16_224.dino") == Path("results/linear_probe/vit_base_patch16_224.dino")
    assert home("/else/where/export") == Path("results/linear_probe/else_where_export")


def past(home: Path, links: list[chain.Link]) -> dict[str, Submission]:
    made = {}
    for link in links:
        made[link.name] = new_submission(home, link.name)
        made[link.name].write_record(Record(link.name, link.job, "local", "1", "h", 0.0, 0.0, "c", 1, 1, 3))
        if link.config is not None:
            (made[link.name].folder / "config.yaml").write_text(dump(link.config))
    return made


@pytest.mark.parametrize(
    ("broken", "again"),
    [
        ({}, []),
        ({"linear_probe": "failed"}, ["linear_probe", "report"]),
        ({"report": "lost"}, ["report"]),
        ({"pretrain": "lost"}, ["pretrain", "object_discovery", "linear_probe", "linear_probe_2", "report"]),
        ({"object_discovery": "cancelled", "report": "queued"}, ["object_discovery", "report"]),
        ({"pretrain": "running", "object_discovery": "queued"}, []),
    ],
)
def test_only_what_broke_and_what_lies_behind_it_runs_again(
    tmp_path: Path, broken: dict[str, str], again: list[str]
) -> None:
    links = chain.links(config(), tmp_path, in_sequence=False)
    before = past(tmp_path, links)
    states = {one: State(broken.get(name, "finished")) for name, one in before.items()}  # type: ignore[arg-type]
    assert [link.name for link in chain.missing(links, before, states)] == again


def test_what_is_configured_otherwise_runs_again(tmp_path: Path) -> None:
    links = chain.links(config(downstream=[{"job": "linear_probe"}]), tmp_path, in_sequence=False)
    before = past(tmp_path, links)
    states = {one: State("finished") for one in before.values()}

    def missing(**changes: object) -> list[str]:
        now = chain.links(config(**changes), tmp_path, in_sequence=False)
        return [link.name for link in chain.missing(now, before, states)]

    assert missing(downstream=[{"job": "linear_probe"}]) == []
    assert missing(downstream=[{"job": "linear_probe"}], cluster={"partition": "other"}) == []
    assert missing(downstream=[{"job": "linear_probe", "seed": 3}]) == ["linear_probe", "report"]
    assert missing(downstream=[{"job": "linear_probe"}], steps=3) == ["pretrain", "linear_probe", "report"]


def test_a_run_that_was_moved_keeps_its_results(tmp_path: Path) -> None:
    links = chain.links(config(), Path("/runs/r"), in_sequence=False)
    before = past(tmp_path, links)
    moved = chain.links(config(name="s"), tmp_path, in_sequence=False)
    assert chain.missing(moved, before, {one: State("finished") for one in before.values()}) == []


def test_a_snapshot_is_the_code_and_is_taken_once(tmp_path: Path) -> None:
    first = snapshot.take(tmp_path)
    assert snapshot.take(tmp_path) == first
    assert (first / "cluster" / "job.py").read_bytes() == (snapshot.REPOSITORY / "cluster" / "job.py").read_bytes()
    assert (first / "COMMIT").read_text().strip()
    assert not list(first.rglob("__pycache__"))
    assert [path.name for path in (tmp_path / "code").iterdir()] == [first.name]


def test_models_that_evaluations_read() -> None:
    assert chain.backbones(LinearProbeConfig(ckpt="a")) == {"ckpt": ("a",), "also": (), "transfer_from": ()}
    named = chain.backbones(config(downstream=[{"job": "object_discovery", "also": ["b", "c"]}]))
    assert {key: models for key, models in named.items() if models} == {"downstream.0.also": ("b", "c")}


def test_inherited_resources_keep_what_was_set() -> None:
    own = Cluster(time_min=30, processes=4)
    made = chain.inherit(own, Cluster(nodes=8, processes=8, partition="p", time_min=999))
    assert (made.time_min, made.processes, made.nodes, made.partition) == (30, 4, 1, "p")
