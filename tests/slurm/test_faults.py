"""A training of 2 nodes x 2 processes on a real SLURM goes through faults, without help and without a trace.

Afterwards its metrics have every step exactly once, and its weights are those of the undisturbed run, bit for bit. Here
are the faults that take more than one blow; the others are in test_moments.py.
"""

from __future__ import annotations

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from tests.slurm import nodes
from tests.slurm.conftest import PATIENCE_S, STEPS, Desk, begin, check

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("healed")]


def test_short_signal(desk: Desk) -> None:
    """The short form: two processes on two nodes, beside an undisturbed run of the same. Bounded on any machine."""
    desk = replace(desk, patience_s=120)
    for name in ("short", "quiet"):
        desk.launch("tiny.yaml", f"name={name}", "cluster.processes=1", "--detach")
    desk.await_step("short", 1)
    nodes.command("scancel", "--signal=USR2", desk.job_id("short"))
    assert desk.await_end("quiet").status == "finished"
    check(desk, "short", desk.home("quiet"))


def test_signal(desk: Desk, undisturbed: Path) -> None:
    nodes.command("scancel", "--signal=USR2", begin(desk, "signal"))
    check(desk, "signal", undisturbed)
    assert desk.training("signal").failures() == []


def test_time_limit(desk: Desk, undisturbed: Path) -> None:
    """The limit comes near while it trains: it saves in time. SLURM looks at limits and signals every 30 s only."""
    job = begin(desk, "limit", "cluster.signal_s=60")
    ranks = nodes.send([pid for pid, _ in nodes.ranks(job)], signal.SIGSTOP)  # or they might be done before the limit
    nodes.command("scontrol", "update", f"JobId={job}", f"TimeLimit={nodes.minutes_run(job) + 2}")
    nodes.wait_for("the signal", lambda: any(nodes.has_heard(pid, signal.SIGUSR2) for pid in ranks), 180)
    nodes.send(ranks, signal.SIGCONT)
    nodes.wait_for("the second life", lambda: len(desk.training("limit").lives()) == 2, PATIENCE_S)
    nodes.command("scontrol", "update", f"JobId={job}", "TimeLimit=60")  # a slow machine must not need many lives
    check(desk, "limit", undisturbed)
    assert desk.training("limit").failures() == []


def test_time_limit_while_the_ranks_are_held_up(desk: Desk, undisturbed: Path) -> None:
    """SLURM wakes stopped processes when their time is over; they save in the seconds that are left, or are killed."""
    job = begin(desk, "stopped", "cluster.signal_s=1")
    nodes.send([pid for pid, _ in nodes.ranks(job)], signal.SIGSTOP)
    nodes.command("scontrol", "update", f"JobId={job}", f"TimeLimit={nodes.minutes_run(job) + 1}")
    nodes.wait_for("the second life", lambda: len(desk.training("stopped").lives()) == 2, PATIENCE_S)
    nodes.command("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    check(desk, "stopped", undisturbed)


def test_preemption_by_a_higher_partition(desk: Desk, undisturbed: Path) -> None:
    begin(desk, "preempted")
    nodes.command("sbatch", "--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
    check(desk, "preempted", undisturbed)
    assert desk.training("preempted").failures() == []


@pytest.mark.parametrize(("num_nodes", "position"), [(1, 0), (2, 0), (2, 1)])
def test_killed_slurmd_with_its_tasks_alive(desk: Desk, undisturbed: Path, num_nodes: int, position: int) -> None:
    """Two lives at once: the old one, held up until the young one owns the run, wakes, is fenced off, and ends."""
    name = f"slurmd{num_nodes}{position}"
    job = begin(desk, name, f"cluster.nodes={num_nodes}", f"cluster.processes={4 // num_nodes}")
    old = [pid for pid, _ in nodes.ranks(job)]
    assert len(old) == 4
    nodes.send(old, signal.SIGSTOP)
    nodes.fault("kill-slurmd", nodes.nodes_of(job)[position])
    owner = desk.home(name) / "owner.json"
    nodes.wait_for("a new owner", lambda: json.loads(owner.read_text())["generation"] == 1, PATIENCE_S)
    survivors = nodes.send(old, signal.SIGCONT)
    assert survivors  # the tasks of the dead slurmd
    check(desk, name, undisturbed)
    nodes.wait_for("the end of the old life", lambda: not nodes.send(survivors, signal.SIGCONT), 120)


@pytest.mark.parametrize("position", [0, 1], ids=["first", "second"])
def test_unplugged_network(desk: Desk, undisturbed: Path, position: int) -> None:
    name = f"unplugged{position}"
    nodes.fault("unplug", nodes.nodes_of(begin(desk, name))[position])
    check(desk, name, undisturbed)


def test_controller_away_while_a_rank_is_killed(desk: Desk, undisturbed: Path) -> None:
    """The batch script asks until slurmctld is back, and `launch.py status` says what is wrong."""
    job = begin(desk, "headless")
    nodes.controller("kill")
    nodes.kill_rank(job, 1)
    said = desk.launch("status", "headless", check=False)
    assert (said.returncode, "slurm controller" in said.stderr) == (2, True)
    log = desk.training("headless").submitit_folder / f"{job}_0_log.out"
    nodes.wait_for("the batch script's question", lambda: "trying again" in log.read_text(), PATIENCE_S)
    nodes.controller("start")
    check(desk, "headless", undisturbed)


def test_resume_after_the_run_was_cancelled(desk: Desk, undisturbed: Path) -> None:
    job = begin(desk, "cancelled")
    ranks = nodes.send([pid for pid, _ in nodes.ranks(job)], signal.SIGSTOP)  # or they might be done before
    with ThreadPoolExecutor() as pool:
        cancelling = pool.submit(desk.launch, "cancel", "cancelled")
        nodes.wait_for("the signal", lambda: any(nodes.has_heard(pid, signal.SIGUSR2) for pid in ranks), 120)
        nodes.send(ranks, signal.SIGCONT)
        cancelling.result()
    assert 15 <= len(desk.rows("cancelled")) < STEPS
    desk.launch("resume", "cancelled", "--detach")
    check(desk, "cancelled", undisturbed, lives=1)
