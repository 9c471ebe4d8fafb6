"""Evaluations beside the training: they see the average, change nothing, hold nothing up, and may fail."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import checkpoint
from pretrain.data.workers import fork_server
from pretrain.distributed import Ranks
from pretrain.observing import Observing
from tests.standin import Contrast
from tests.standin_run import Looker, Slow, events, final_weights, rows, run_standin, settings

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


pytestmark = pytest.mark.usefixtures("own_seams")


class Average:
    """What `begin` asks of the average."""

    def weights(self) -> dict[str, torch.Tensor]:
        return dict(Contrast().module.state_dict())


def observing(*observers: Any) -> tuple[Observing, list[dict[str, Any]]]:
    said: list[dict[str, Any]] = []
    report = lambda event, **fields: said.append({"event": event, **fields})  # noqa: E731
    return Observing(observers, Contrast(), settings(), ALONE, report=report), said


def test_observers_see_the_average_and_change_nothing(tmp_path: Path) -> None:
    for name, observers in (("plain", []), ("observed", [Looker(20)])):
        assert run_standin(tmp_path / name, observers=observers) == "finished"
    run = tmp_path / "observed"
    (row,) = [json.loads(line) for line in (run / "observed.jsonl").read_text().splitlines()]
    averaged = checkpoint.load(checkpoint.folder(run, 20)).tensors["ema"]
    sums = sum(float(tensor.double().sum()) for name, tensor in averaged.items() if name.startswith("backbone."))
    assert row == {"step": 20, "sum": pytest.approx(sums, abs=1e-6)}
    assert [entry["step"] for entry in rows(run)] == list(range(1, 31))
    expected = final_weights(tmp_path / "plain")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in final_weights(run).items())


def test_the_training_does_not_wait_and_says_what_it_leaves_out() -> None:
    watched, said = observing(Slow(1, seconds=2.0))
    average: Any = Average()
    fork_server()
    begin = time.monotonic()
    watched.begin(1, average)
    watched.begin(2, average)
    assert time.monotonic() - begin < 1.5
    assert watched.rows() == []
    assert [(event["event"], event["step"]) for event in said] == [("not_observed", 2)]
    signs: list[float] = []
    watched.begin(3, average, patient=True, alive=lambda: signs.append(time.monotonic()))
    assert signs  # while it waited, for the watchdog
    watched.join()
    assert [row["step"] for row in watched.rows()] == [1, 3]


def test_an_observer_that_fails_or_dies_ends_nothing() -> None:
    watched, said = observing(Looker(1, fault="raise"))
    average: Any = Average()
    watched.begin(1, average)
    watched.join()
    assert "ValueError: as asked" in said[0]["reason"]
    watched, said = observing(Looker(1, fault="die"))
    watched.begin(1, average)
    watched.join()
    assert "ended early" in said[0]["reason"]


def test_closing_ends_what_runs() -> None:
    watched, said = observing(Slow(1, seconds=600.0))
    average: Any = Average()
    watched.begin(1, average)
    while watched._process is None:
        time.sleep(0.01)
    begin = time.monotonic()
    watched.close()
    assert time.monotonic() - begin < 10
    assert said[0]["reason"] == "the training ended before it did"


def test_figures_of_a_step_that_is_undone_are_cut(tmp_path: Path) -> None:
    """A run goes back behind an evaluation and makes it again."""
    changes = {"checkpoints": {"keep_last": 5}}
    assert run_standin(tmp_path, changes, [Looker(5)]) == "finished"
    (checkpoint.folder(tmp_path, 30) / "state.json").write_text("{}")
    assert run_standin(tmp_path, changes, [Looker(5)]) == "finished"
    steps = [json.loads(line)["step"] for line in (tmp_path / "observed.jsonl").read_text().splitlines()]
    left_out = [event["step"] for event in events(tmp_path) if event["event"] == "not_observed"]
    assert len(steps) == len(set(steps))
    assert set(steps) | set(left_out) == {5, 10, 15, 20, 25, 30}
    assert 30 in steps
