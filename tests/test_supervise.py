"""Local runs with real processes: restarts, bounds, stops, chains. The training is a stand-in without torch."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import chain, control, launch
from cluster.process import alive
from cluster.state import state_of
from cluster.submission import Submission, latest
from cluster.supervise import describe
from configs import UserError

TESTS = Path(__file__).parent

OBJECTS = "{job: object_discovery, preset: tetrominoes, data: shards}"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a configuration and shards, in which jobs run the stand-ins."""
    entries = {"pretrain": "train", "object_discovery": "evaluate", "linear_probe": "evaluate", "report": "report"}
    for job, name in entries.items():
        monkeypatch.setitem(chain.ENTRIES, job, f"standin_job:{name}")
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.tar").touch()
    (tmp_path / "run.yaml").write_text(
        "name: r\nbatch_size: 8\nsteps: 20\nmodel: {name: akorn_nano_patch4_32}\ndata: {shards: shards}\n"
        "views: {size: 32}\ncluster: {executor: local, processes: 2, gpus: 0}\n"
    )
    return tmp_path


def rows(home: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def has_steps(home: Path, count: int) -> bool:
    return (home / "metrics.jsonl").exists() and len(rows(home)) >= count


def rank_pids(submission: Submission) -> list[int]:
    """Process ids of the ranks: the children of the supervisor."""
    record = submission.record()
    assert record is not None
    pid = record.job_id
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_run_finishes_and_says_where_things_are(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["run.yaml"]) == 0
    said = capsys.readouterr().out
    assert "runs/r" in said
    assert "pretrain: finished" in said
    assert [row["step"] for row in rows(place / "runs" / "r")] == list(range(1, 21))
    assert (place / "runs" / "r" / "logs" / "pretrain.rank0.log").exists()


def test_a_killed_rank_ends_all_and_the_run_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_STEP_S", "0.05")
    assert launch.main(["run.yaml", "steps=100", "--detach"]) == 0
    home = place / "runs" / "r"
    wait_for(lambda: has_steps(home, 12))
    submission = latest(home)["pretrain"]
    ranks = rank_pids(submission)
    os.kill(ranks[1], signal.SIGKILL)
    wait_for(lambda: submission.outcome() is not None, 60)
    assert state_of(submission).name == "finished"
    assert {row["step"] for row in rows(home)} == set(range(1, 101))
    first, second = submission.lives()
    assert second["generation"] > first["generation"]
    (failure,) = submission.failures()
    assert "rank 1 was killed by SIGKILL" in failure["exits"]
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


def test_restarts_without_progress_are_bounded(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain.ENTRIES["pretrain"] = "standin_job:missing"
    assert launch.main(["run.yaml", "resilience.max_restarts=1"]) == 1
    submission = latest(place / "runs" / "r")["pretrain"]
    assert len(submission.failures()) == 2
    said = capsys.readouterr().out
    assert "broke 2 times in a row" in said
    assert "no attribute 'missing'" in said  # the end of the log is shown


def test_what_ends_a_job_before_its_ranks_begin_is_shown(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["run.yaml", "cluster.setup=[echo no such module, exit 3]"]) == 1
    assert "  | no such module\n  all of it: runs/r/jobs/0000_pretrain/supervisor.log" in capsys.readouterr().out
    assert launch.main(["logs", "r"]) == 0
    assert capsys.readouterr().out == "no such module\n"


def test_ctrl_c_saves_and_stops_and_resume_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_STEP_S", "0.05")
    home = place / "runs" / "r"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite run in the background inherits an ignored one

    def press() -> None:
        wait_for(lambda: has_steps(home, 3))
        os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press)
    presser.start()
    assert launch.main(["run.yaml", "steps=200"]) == 130
    presser.join()
    done = len(rows(home))
    assert 3 <= done < 200
    assert state_of(latest(home)["pretrain"]).name == "stopped"
    monkeypatch.setenv("STANDIN_STEP_S", "0")
    assert launch.main(["resume", "r"]) == 0
    assert [row["step"] for row in rows(home)] == list(range(1, 201))


def test_a_stop_between_two_lives_is_heeded(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_STEP_S", "0.05")
    assert launch.main(["run.yaml", "steps=1000", "--detach"]) == 0
    home = place / "runs" / "r"
    wait_for(lambda: has_steps(home, 3))
    submission = latest(home)["pretrain"]
    os.kill(rank_pids(submission)[1], signal.SIGKILL)
    wait_for(lambda: bool(submission.failures()))  # now the supervisor pauses before the next life
    control.ask_to_stop(submission)
    wait_for(lambda: submission.outcome() is not None)
    assert state_of(submission).name == "stopped"


def test_a_configuration_that_was_broken_meanwhile_ends_the_job_for_good(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STANDIN_STEP_S", "0.05")
    assert launch.main(["run.yaml", "steps=1000", "--detach"]) == 0
    home = place / "runs" / "r"
    wait_for(lambda: has_steps(home, 3))
    submission = latest(home)["pretrain"]
    (home / "config.yaml").write_text("batch_size: [\n")
    os.kill(rank_pids(submission)[1], signal.SIGKILL)
    wait_for(lambda: submission.outcome() is not None)
    state = state_of(submission)
    assert state.name == "failed"
    assert "config.yaml:2: not valid YAML" in state.detail
    assert len(submission.failures()) == 1


def test_a_second_launch_says_that_the_run_is_running_and_where(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_STEP_S", "0.1")
    launch.main(["run.yaml", "steps=1000", "--detach"])
    submission = latest(place / "runs" / "r")["pretrain"]
    with pytest.raises(UserError, match=r"is (running|queued) already: pretrain, \S+, process \d+"):
        launch.main(["run.yaml", "steps=1000"])
    assert launch.main(["cancel", "r"]) == 0
    record = submission.record()
    assert record is not None
    wait_for(lambda: not alive(int(record.job_id), record.started_at))
    assert state_of(submission).name == "cancelled"


def test_an_evaluation_ends_at_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_EVALUATION_S", "100")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    home = place / "runs" / "r"
    begin = time.monotonic()

    def evaluates() -> bool:
        return "object_discovery" in latest(home) and bool(latest(home)["object_discovery"].lives())

    def press() -> None:
        wait_for(evaluates)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    assert launch.main(["run.yaml", f"downstream=[{OBJECTS}]"]) == 130
    assert state_of(latest(home)["object_discovery"]).name == "stopped"
    assert launch.main(["resume", "r", "--detach"]) == 0
    wait_for(evaluates)
    monkeypatch.setattr(control, "_POLL_S", 1.0)  # time for what waits for another to start as that one ends
    assert launch.main(["cancel", "r"]) == 0
    assert {link: state_of(one).name for link, one in latest(home).items()} == {
        "pretrain": "finished",
        "object_discovery": "cancelled",
        "report": "cancelled",
    }
    assert time.monotonic() - begin < 60


def test_ctrl_c_ends_a_sweep_and_the_same_command_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_STEP_S", "0.1")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    command = ["run.yaml", "--sweep", "seed=0,1"]
    first, second = place / "runs" / "r_seed-0", place / "runs" / "r_seed-1"

    def interrupt() -> None:
        wait_for(lambda: has_steps(first, 1))
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    assert launch.main(command) == 130
    assert not second.exists()
    monkeypatch.setenv("STANDIN_STEP_S", "0")
    assert launch.main(command) == 0
    assert [row["step"] for row in rows(first)] == [row["step"] for row in rows(second)] == list(range(1, 21))


def test_a_copy_of_a_running_run_has_no_part_in_its_job(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STANDIN_STEP_S", "0.1")
    launch.main(["run.yaml", "steps=1000", "--detach"])
    home = place / "runs" / "r"
    wait_for(lambda: has_steps(home, 1))
    shutil.copytree(home, place / "a fork")
    assert launch.main(["status", "a fork"]) == 0
    said = capsys.readouterr().out
    assert "lost" in said
    assert f"of {home}/jobs/0000_pretrain, of which this is a copy" in said
    assert "go on: python cluster/launch.py resume 'a fork'" in said
    with pytest.raises(UserError, match=r"nothing is queued or running; see .* status 'a fork'"):
        launch.main(["cancel", "a fork"])
    assert launch.main(["cancel", "r"]) == 0
    assert state_of(latest(home)["pretrain"]).name == "cancelled"


def test_ranks_end_with_their_supervisor(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_STEP_S", "0.1")
    launch.main(["run.yaml", "steps=1000", "--detach"])
    home = place / "runs" / "r"
    submission = latest(home)["pretrain"]
    wait_for(lambda: has_steps(home, 1))
    ranks = rank_pids(submission)
    record = submission.record()
    assert record is not None
    os.kill(int(record.job_id), signal.SIGKILL)
    wait_for(lambda: not any(alive(pid, _start(pid)) for pid in ranks))
    assert state_of(submission).name == "lost"
    monkeypatch.setenv("STANDIN_STEP_S", "0")
    assert launch.main(["resume", "r", "steps=60"]) == 0


def _start(pid: int) -> float:
    from cluster.process import started_at

    return started_at(pid) or -1.0


CHAIN = f"downstream=[{OBJECTS}, {{job: linear_probe, train: shards, data: shards}}]"


def test_the_chain_runs_in_order_and_ends_with_the_report(place: Path) -> None:
    assert launch.main(["run.yaml", CHAIN]) == 0
    home = place / "runs" / "r"
    assert (home / "report.html").read_text() == "linear_probe object_discovery"
    result = json.loads((home / "downstream" / "linear_probe" / "results.json").read_text())
    assert result["ckpt"] == str(home)
    assert result["WORLD_SIZE"] == "1"
    ended = [latest(home)[name].outcome() for name in ("pretrain", "object_discovery", "linear_probe", "report")]
    times = [outcome.time for outcome in ended if outcome is not None]
    assert len(times) == 4
    assert times == sorted(times)


def test_a_broken_link_is_started_again_where_it_broke(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chain, "_EVALUATION_RESTARTS", 0)
    monkeypatch.setenv("STANDIN_BREAK", "object_discovery")
    assert launch.main(["run.yaml", CHAIN]) == 1
    assert launch.main(["status", "r"]) == 0
    remedy = "go on: python cluster/launch.py resume r\n"
    assert remedy in capsys.readouterr().out.split("folder: ")[1]
    home = place / "runs" / "r"
    before = latest(home)
    states = {name: state_of(submission).name for name, submission in before.items()}
    assert states == {
        "pretrain": "finished",
        "object_discovery": "failed",
        "linear_probe": "finished",
        "report": "finished",
    }
    monkeypatch.delenv("STANDIN_BREAK")
    assert launch.main(["resume", "r"]) == 0
    after = latest(home)
    again = {name for name in after if after[name].folder != before[name].folder}
    assert again == {"object_discovery", "report"}
    assert (home / "report.html").read_text() == "linear_probe object_discovery"


def test_an_evaluation_runs_on_many_processes(place: Path) -> None:
    (place / "probe.yaml").write_text(
        "job: linear_probe\nckpt: shards\ntrain: shards\ndata: shards\nout: found\n"
        "cluster: {executor: local, processes: 3, gpus: 0}\n"
    )
    assert launch.main(["probe.yaml"]) == 0
    result = json.loads((place / "found" / "results.json").read_text())
    assert result["WORLD_SIZE"] == "3"
    assert result["MASTER_ADDR"] == "127.0.0.1"


def test_exit_codes_in_words() -> None:
    assert describe([0, -9, 1]) == "rank 1 was killed by SIGKILL, rank 2 failed (1)"
