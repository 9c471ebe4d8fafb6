"""Whole runs: once through, stopped and resumed, killed, extended, rolled back, on other world sizes and stages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.progress import event_text
from configs.errors import UserError
from pretrain import checkpoint, resume, session, train
from pretrain.distributed import Ranks
from tests.standin import run_ranks
from tests.standin_run import events, final_weights, replace_seams, rows, run_standin

ROOT = Path(__file__).resolve().parents[1]


pytestmark = pytest.mark.usefixtures("own_seams")


@pytest.fixture(autouse=True)
def _standins() -> None:
    replace_seams()


@pytest.fixture(scope="module")
def undisturbed(own_seams: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed")
    assert run_standin(run_dir) == "finished"
    return run_dir


def losses(run_dir: Path) -> list[float]:
    assert [row["step"] for row in rows(run_dir)] == list(range(1, len(rows(run_dir)) + 1))
    return [row["loss"] for row in rows(run_dir)]


def bitwise(one: Path, other: Path) -> bool:
    first, second = final_weights(one), final_weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_run_has_a_row_for_each_step_and_leaves_what_it_promises(undisturbed: Path) -> None:
    assert len(losses(undisturbed)) == 30
    row = rows(undisturbed)[9]
    assert row.keys() >= {"step", "loss", "accuracy", "grad_norm", "lr", "views_per_s", "step_s", "data_wait_s"}
    assert [path.name for _, path in checkpoint.existing(undisturbed)] == ["step_00000020", "step_00000030"]
    assert {"model.safetensors", "config.json", "README.md"} <= {p.name for p in (undisturbed / "export").iterdir()}
    happened = [event["event"] for event in events(undisturbed)]
    assert (happened[0], happened[-1]) == ("started", "finished")


def test_killed_run_goes_on_bitwise(undisturbed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "STANDIN_STEP_S": "0.05", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "tests.standin_run", str(tmp_path), "{}"], env=environment)
    metrics, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 240  # importing takes long on a busy machine
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 15:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    again = subprocess.run(
        [sys.executable, "-m", "tests.standin_run", str(tmp_path), "{}"],
        env={**environment, "STANDIN_STEP_S": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert again.stderr == ""  # no library says anything
    assert all(text.startswith("step ") for text in again.stdout.splitlines()[:-1])
    assert losses(tmp_path) == losses(undisturbed)
    assert bitwise(tmp_path, undisturbed)
    assert [event["step"] for event in events(tmp_path) if event["event"] == "started"] in ([0, 10], [0, 0])


def test_stop_saves_and_resumes_bitwise(undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests import standin_run

    read = standin_run.FaultyLoader.__getitem__

    def asking(self: Any, step: int) -> Any:
        if step == 12:
            os.kill(os.getpid(), signal.SIGUSR2)
        return read(self, step)

    monkeypatch.setattr(standin_run.FaultyLoader, "__getitem__", asking)
    assert run_standin(tmp_path) == "preempted"
    monkeypatch.setattr(standin_run.FaultyLoader, "__getitem__", read)
    assert checkpoint.existing(tmp_path)[-1][0] in (13, 14)
    assert run_standin(tmp_path) == "finished"
    assert losses(tmp_path) == losses(undisturbed)
    assert bitwise(tmp_path, undisturbed)


def test_damaged_checkpoint_falls_back(undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_standin(tmp_path, {"checkpoints": {"keep_last": 5}}) == "finished"
    newest = checkpoint.folder(tmp_path, 30)
    file = newest / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-7] + b"damaged")
    capsys.readouterr()
    assert run_standin(tmp_path) == "finished"
    assert "weights.safetensors does not match its checksum" in capsys.readouterr().out
    assert losses(tmp_path) == losses(undisturbed)
    assert bitwise(tmp_path, undisturbed)
    assert (tmp_path / "checkpoints" / "damaged_step_00000030").is_dir()


def test_finished_run_can_be_extended_and_nothing_else_changed(tmp_path: Path, undisturbed: Path) -> None:
    constant = {"schedule": {"name": "constant", "warmup_steps": 3}}
    assert run_standin(tmp_path / "short", {"steps": 14, **constant}) == "finished"
    assert run_standin(tmp_path / "short", {"steps": 22, **constant}) == "finished"
    assert run_standin(tmp_path / "long", {"steps": 22, **constant}) == "finished"
    assert losses(tmp_path / "short") == losses(tmp_path / "long")
    assert bitwise(tmp_path / "short", tmp_path / "long")
    with pytest.raises(UserError, match="22 steps already and is to have 9; give more"):
        run_standin(tmp_path / "short", {"steps": 9, **constant})
    with pytest.raises(UserError, match=r"optimizer\.lr"):
        run_standin(tmp_path / "short", {"steps": 22, **constant, "optimizer": {"lr": 2e-2}})


def test_other_samples_are_refused_wherever_they_lie(undisturbed: Path) -> None:
    snapshot = resume.find(undisturbed, Ranks(0, 1, 0, torch.device("cpu")), lambda *_, **__: None)
    assert snapshot is not None
    snapshot.state["data_fingerprint"] = "a" * 64
    resume.check_data(snapshot, "a" * 64)
    with pytest.raises(UserError, match=r"no longer those that this run began with.*init_from"):
        resume.check_data(snapshot, "b" * 64)


def test_bad_step_is_skipped_and_its_samples_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_NAN", "12")
    assert run_standin(tmp_path) == "finished"
    bad = [row for row in rows(tmp_path) if row["skipped"]]
    assert [row["step"] for row in bad] == [13]
    assert bad[0]["loss"] is None
    written = json.loads((tmp_path / "bad_batches.jsonl").read_text())
    assert written["step"] == 13
    assert written["keys"][0] == f"vector_{12 * 16 % 64:04d}"
    assert all(torch.isfinite(tensor).all() for tensor in final_weights(tmp_path).values())


def test_bad_stretch_is_rolled_back_and_skipped_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_NAN", ",".join(map(str, range(12, 18))))
    assert run_standin(tmp_path) == "finished"
    assert len(losses(tmp_path)) == 30
    assert not any(row["skipped"] for row in rows(tmp_path))
    (rollback,) = [event for event in events(tmp_path) if event["event"] == "rollback"]
    assert rollback["skips_batches_before"] == 20
    assert checkpoint.load(checkpoint.folder(tmp_path, 30)).state["stream"] == 40


def test_rollback_lets_go_of_what_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[weakref.ref[torch.nn.Module]] = []
    alive: list[int] = []

    def opened(*args: Any) -> session.Session:
        alive.append(sum(model() is not None for model in models))
        new = session.open_session(*args)
        models.append(weakref.ref(new.task.module))
        return new

    monkeypatch.setattr(train, "open_session", opened)
    monkeypatch.setenv("STANDIN_NAN", ",".join(map(str, range(12, 18))))
    assert run_standin(tmp_path) == "finished"
    assert alive == [0, 0]


def test_hopeless_run_ends_with_a_diagnosis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_NAN", ",".join(map(str, range(12, 200))))
    with pytest.raises(UserError, match=r"not finite in .* steps in a row.*bad_batches.jsonl"):
        run_standin(tmp_path)
    assert all(torch.isfinite(tensor).all() for tensor in final_weights(tmp_path).values())


def test_bad_steps_right_after_a_restart_are_skipped_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_standin(tmp_path, {"steps": 10}) == "finished"
    monkeypatch.setenv("STANDIN_NAN", ",".join(map(str, range(10, 15))))
    assert run_standin(tmp_path) == "finished"
    assert [event["event"] for event in events(tmp_path)].count("rollback") == 1
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 31))


def test_full_disk_stops_nothing(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = checkpoint.write_tensors

    def full(path: Path, tensors: dict[str, torch.Tensor]) -> str:
        if "00000020" in str(path) and path.name.startswith("moments"):
            raise OSError(28, "No space left on device")
        return write(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    assert run_standin(tmp_path) == "finished"
    assert "No space left on device" in capsys.readouterr().out
    assert [step for step, _ in checkpoint.existing(tmp_path)] == [10, 30]
    assert bitwise(tmp_path, undisturbed)


def test_init_from_takes_weights_and_nothing_else(undisturbed: Path, tmp_path: Path) -> None:
    assert run_standin(tmp_path, {"init_from": str(undisturbed), "steps": 1, "optimizer": {"lr": 1e-9}}) == "finished"
    averaged = checkpoint.load(checkpoint.folder(undisturbed, 30)).tensors["ema"]
    for name, tensor in final_weights(tmp_path).items():
        torch.testing.assert_close(tensor, averaged[name], rtol=0, atol=1e-6)
    assert events(tmp_path)[0]["loaded"] == "whole model"
    with pytest.raises(UserError, match="init_from"):
        run_standin(tmp_path / "other", {"init_from": str(tmp_path / "nothing")})


def test_data_bottleneck_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests import standin_run

    monkeypatch.setattr(standin_run.FaultyLoader, "wait_s", 1e3)
    assert run_standin(tmp_path) == "finished"
    said = [event for event in events(tmp_path) if event["event"] == "waits_for_data"]
    assert [event["advice"] for event in said] == ["read faster"]


def test_what_is_odd_about_the_data_is_an_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests import standin_run

    note = (
        "shards are sorted by class (100% of neighbours share their label): windows will lack negatives of other "
        "classes; write them again with make_shards.py or raise data.window"
    )
    monkeypatch.setattr(standin_run.FaultyLoader, "warnings", lambda _: [note])
    assert run_standin(tmp_path) == "finished"
    said = [event for event in events(tmp_path) if event["event"] == "irregular_data"]
    assert [event_text(event) for event in said] == [f"irregular_data: note {note}"]  # with the remedy


def test_batch_norm_is_refused_where_chunks_would_change_it(tmp_path: Path) -> None:
    from pretrain.distributed import Ranks
    from pretrain.session import _check_norms
    from tests.standin_run import settings

    module = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3))
    alone, two = (Ranks(0, world_size, 0, torch.device("cpu")) for world_size in (1, 2))
    _check_norms(module, settings(), alone)
    _check_norms(module[:1], settings(compute={"micro_batch": 4}), two)
    with pytest.raises(UserError, match="BatchNorm"):
        _check_norms(module, settings(), two)
    with pytest.raises(UserError, match="BatchNorm"):
        _check_norms(module, settings(compute={"micro_batch": 4}), alone)


LIVES = [  # (world size, ZeRO stage, micro-batch, separable is False) of the lives of one run, ten steps each
    (1, 0, None),
    (2, 1, 4),
    (4, 3, None),
    (2, 2, 3),
    (1, 3, 5),
]


def _one_life(run_dir: str, steps: int, stage: int, micro_batch: int | None) -> str:
    compute = {"zero_stage": stage, "micro_batch": micro_batch}
    return run_standin(run_dir, {"steps": steps, "schedule": {"name": "constant"}, "compute": compute})


@pytest.mark.slow
def test_world_size_stage_and_chunks_may_change_between_lives(tmp_path: Path) -> None:
    for index, (world_size, stage, micro_batch) in enumerate(LIVES):
        run_ranks(
            world_size,
            _one_life,
            tmp_path / f"life{index}",
            str(tmp_path / "run"),
            10 * (index + 1),
            stage,
            micro_batch,
        )
    whole = {"steps": 50, "schedule": {"name": "constant"}}
    assert run_standin(tmp_path / "reference", whole) == "finished"
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "reference"), rel=2e-4)
