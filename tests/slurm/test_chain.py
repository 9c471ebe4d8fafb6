"""Jobs that depend on each other, arrays, and commands, on a real SLURM with the real evaluations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.state import state_of
from cluster.submission import latest
from tests.slurm import nodes
from tests.slurm.conftest import PATIENCE_S, STEPS, Desk
from tests.slurm.moments import strike

pytestmark = pytest.mark.slurm

SMALL = "starts: 1, images: 8, size: 16, k: 4, components: null, pictures: 2, baselines: [], controls: []"
CHAIN = (
    f"downstream=[{{job: object_discovery, data: shards, {SMALL}}}, "
    "{job: linear_probe, train: labelled, data: labelled, epochs: 1}]"
)


def make_labelled(desk: Desk) -> None:
    """A labelled set: dark and bright images."""
    for name, brightness in (("dark", 60), ("bright", 200)):
        (desk.folder / "images" / name).mkdir(parents=True)
        for number in range(12):
            pixels = np.random.default_rng(number).integers(-50, 50, (16, 16, 3)) + brightness
            Image.fromarray(pixels.astype(np.uint8)).save(desk.folder / "images" / name / f"{number}.png")
    desk.make_shards("folder", "images", "labelled")


def test_the_chain_finishes_from_one_command_and_goes_on_where_it_broke(desk: Desk) -> None:
    make_labelled(desk)
    desk.launch("tiny.yaml", "name=chain", "steps=20", CHAIN, "--detach")
    home = desk.home("chain")
    probe = latest(home)["linear_probe"]
    record = probe.record()
    assert record is not None
    nodes.command("scancel", record.job_id)  # killed for good while it waits
    desk.await_end("chain", "report")
    states = {name: state_of(one).name for name, one in latest(home).items()}
    assert states == {
        "pretrain": "finished",
        "object_discovery": "finished",
        "linear_probe": "cancelled",
        "report": "finished",
    }
    desk.launch("resume", "chain")
    assert {name: state_of(one).name for name, one in latest(home).items()} == dict.fromkeys(states, "finished")
    assert latest(home)["pretrain"].number == 0
    for task in ("object_discovery", "linear_probe"):
        assert json.loads((home / "downstream" / task / "results.json").read_text())
    assert "linear_probe" in (home / "report.html").read_text()


def test_an_evaluation_on_two_nodes_equals_one_process(desk: Desk, undisturbed: Path, healed: None) -> None:
    """At the same time as one on one process, and although a rank is killed and then a node dies."""
    (desk.folder / "discover.yaml").write_text(
        "job: object_discovery\nckpt: runs/undisturbed\ndata: shards\n"
        + SMALL.replace(", ", "\n").replace("\n[", ", [")
    )
    for name, size in (("four", 2), ("one", 1)):
        cluster = ["cluster.executor=slurm", f"cluster.nodes={size}", f"cluster.processes={size}", "cluster.gpus=0"]
        desk.launch("discover.yaml", f"name={name}", *cluster, "--detach")
    started = latest(undisturbed)
    strike(started["four"], 0, "importing", "kill last")
    strike(started["four"], 1, "importing", "crash second")
    results = {}
    for name in ("one", "four"):
        assert desk.await_end("undisturbed", name).status == "finished"
        results[name] = json.loads((undisturbed / "downstream" / name / "results.json").read_text())
    assert results["one"]["models"] == results["four"]["models"]
    assert len(started["four"].failures()) == 1


def test_a_sweep_is_one_array(desk: Desk, healed: None) -> None:
    """Of its tasks one is told to save, and of another a rank is killed: each goes on by itself."""
    small = ["cluster.nodes=1", "cluster.processes=2"]
    said = desk.launch("tiny.yaml", "name=sweep", *small, "--sweep", "optimizer.lr=1e-3,1e-4").stdout
    runs = [f"sweep_lr-{value}" for value in ("1e-3", "1e-4")]
    assert all(run in said for run in runs)
    jobs = [desk.job_id(run) for run in runs]
    assert [job.partition("_")[2] for job in jobs] == ["0", "1"]
    strike(desk.training(runs[0]), 0, "importing", "signal")
    nodes.wait_for("the second task", lambda: bool(desk.training(runs[1]).lives()), PATIENCE_S)
    nodes.kill_rank(nodes.command("squeue", "-h", "-j", jobs[1], "-o", "%A"), 1)
    for run in runs:
        assert desk.await_end(run).status == "finished"
        assert [row["step"] for row in desk.rows(run)] == list(range(1, STEPS + 1))
        assert len(desk.training(run).lives()) == 2
    (failure,) = desk.training(runs[1]).failures()
    assert "Killed" in failure["exits"]
    first, second = (desk.rows(run)[-1]["loss"] for run in runs)
    assert first != second


def test_what_the_commands_say(desk: Desk, undisturbed: None) -> None:
    said = desk.launch("status", "undisturbed").stdout
    assert "finished" in said
    assert "step 60/60" in said
    assert "step 60/60" in desk.launch("logs", "undisturbed", "--job", "pretrain", "--rank", "0").stdout
    assert "undisturbed" in desk.launch("list").stdout
    refused = desk.launch("tiny.yaml", "name=huge", "cluster.nodes=9", "batch_size=18", check=False)
    assert refused.returncode == 2
    assert "cluster.nodes=9, but partition debug has 3" in refused.stderr
