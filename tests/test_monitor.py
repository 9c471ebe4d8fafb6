"""What is logged: rows, spikes, files that are cut and fenced, figures of embeddings against plain loops."""

from __future__ import annotations

import itertools
import json
import math
from collections import deque
from pathlib import Path

import pytest
import torch

from configs.schema import Monitor as MonitorConfig
from pretrain.data.batch import Batch
from pretrain.display import figure, line
from pretrain.distributed import Ranks, join, leave
from pretrain.engine import StepResult
from pretrain.monitor import Monitor, is_spike
from pretrain.representation import describe, effective_rank, uniformity
from pretrain.runlog import Events, MetricsFile, read_rows
from tests.standin import run_ranks

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


def observe(monitor: Monitor, step: int, loss: float, skipped: float = 0.0) -> None:
    numbers = torch.arange(4)
    batch = Batch({"images": torch.zeros(4)}, numbers, numbers, numbers, 0)
    result = StepResult(torch.tensor(2.0), torch.tensor(skipped))
    monitor.observe(step, batch, {"loss": torch.tensor(loss)}, result, lr=0.1, wait_s=0.5)


def steps_in(path: Path) -> list[int]:
    return [row["step"] for _, row in read_rows(path)]


def test_rows_appear_when_read_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    monitor = Monitor(MonitorConfig(log_every=2), ALONE, metrics=MetricsFile(path, 0), sinks=[], views=8)
    observe(monitor, 1, 3.0)
    assert steps_in(path) == []
    observe(monitor, 2, 2.5, skipped=1.0)
    assert monitor.due(2)
    reading = monitor.read()
    first, second = (json.loads(text) for text in path.read_text().splitlines())
    assert (first["step"], first["loss"], first["skipped"], first["data_wait_s"]) == (1, 3.0, False, 0.5)
    assert second["skipped"] is True
    assert first["views_per_s"] == pytest.approx(8 / first["step_s"])
    assert [record.step for record in reading.bad] == [2]
    assert reading.sick
    assert monitor.read().last is None


def _waiting(run_dir: str) -> tuple[float, int]:
    ranks = join()
    file = MetricsFile(Path(run_dir) / "metrics.jsonl", 0) if ranks.first else None
    monitor = Monitor(MonitorConfig(), ranks, metrics=file, sinks=[], views=8)
    numbers = torch.arange(2)
    for step in range(1, 6):
        batch = Batch({"images": torch.zeros(2)}, numbers, numbers, numbers, 0)
        result = StepResult(torch.tensor(2.0), torch.tensor(0.0))
        wait_s = 2.0 + step if ranks.rank == 1 else 0.1 + 9 * (step == 5)  # the usual wait is what counts
        monitor.observe(step, batch, {"loss": torch.tensor(float(ranks.rank))}, result, lr=0.1, wait_s=wait_s)
    reading = monitor.read()
    leave()
    return reading.wait_s, reading.waiting


def test_the_longest_wait_of_any_rank_is_logged(tmp_path: Path) -> None:
    assert run_ranks(3, _waiting, tmp_path / "out", str(tmp_path)) == [(5.0, 1)] * 3
    logged = [row for _, row in read_rows(tmp_path / "metrics.jsonl")]
    assert [row["data_wait_s"] for row in logged] == [3.0, 4.0, 5.0, 6.0, 9.1]
    assert [row["data_wait_rank"] for row in logged][:4] == [1, 1, 1, 1]
    assert logged[4]["data_wait_rank"] in (0, 2)
    assert [row["loss"] for row in logged] == [1.0] * 5  # the mean over the ranks


def test_figures_of_evaluations_have_a_file_of_their_own(tmp_path: Path) -> None:
    written: list[dict[str, float]] = []

    class Kept:
        write, close = written.append, lambda self: None

    path = tmp_path / "observed.jsonl"
    monitor = Monitor(
        MonitorConfig(),
        ALONE,
        metrics=None,
        observed=MetricsFile(path, 0),
        sinks=[Kept()],
        views=8,  # type: ignore[list-item]
    )
    monitor.observed([{"step": 7, "knn": 0.5}])
    monitor.close()
    assert json.loads(path.read_text()) == {"step": 7, "knn": 0.5} == written[0]


def test_series_of_bad_steps_are_counted_across_readings() -> None:
    monitor = Monitor(MonitorConfig(), ALONE, metrics=None, sinks=[], views=8)
    for step, skipped in enumerate([0.0, 1.0, 1.0], start=1):
        observe(monitor, step, math.nan if skipped else 1.0, skipped)
    assert monitor.read().bad_in_row == 2
    for step, skipped in enumerate([1.0, 0.0, 1.0], start=4):
        observe(monitor, step, 1.0, skipped)
    reading = monitor.read()
    assert reading.bad_in_row == 3
    assert reading.sick


def test_not_a_number_is_null_in_json(tmp_path: Path) -> None:
    monitor = Monitor(MonitorConfig(), ALONE, metrics=MetricsFile(tmp_path / "m.jsonl", 0), sinks=[], views=8)
    observe(monitor, 1, math.nan)
    observe(monitor, 2, math.inf)
    monitor.read()
    assert [row["loss"] for _, row in read_rows(tmp_path / "m.jsonl")] == [None, None]


def test_spike() -> None:
    usual = deque([1.0 + 0.01 * (i % 5) for i in range(50)])
    assert is_spike(1.5, usual)
    assert not is_spike(1.05, usual)
    assert not is_spike(0.1, usual)
    assert not is_spike(9.0, deque([1.0] * 5))


def test_of_many_spikes_few_are_told_and_all_are_in_the_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    monitor = Monitor(MonitorConfig(), ALONE, metrics=MetricsFile(path, 0), sinks=[], views=8)
    told = []
    for step in range(1, 2301):
        observe(monitor, step, 1.2 if step % 50 == 0 else 1.0)
        if step % 10 == 0:
            told += [(record.step, figures["spikes"]) for record, figures in monitor.read().spikes]
    assert told == [(50, 1), (1050, 20), (2050, 20)]
    assert [row["step"] for _, row in read_rows(path) if row.get("spike")] == list(range(50, 2301, 50))


def test_new_life_cuts_what_it_undoes_and_shuts_the_old_one_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    old = MetricsFile(path, 0)
    old.append({"step": step} for step in range(1, 8))
    with open(path, "a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    new = MetricsFile(path, 5)
    old.append([{"step": 8}, {"step": 9}])
    new.append([{"step": 6, "new": True}])
    assert steps_in(path) == [1, 2, 3, 4, 5, 6]


def test_events_are_recorded_and_loud_ones_said(tmp_path: Path) -> None:
    said: list[str] = []
    events = Events(tmp_path / "events.jsonl", say=said.append)
    events("saved", step=3)
    events("damaged", path="x", reason="y")
    rows = [json.loads(text) for text in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [row["event"] for row in rows] == ["saved", "damaged"]
    assert said == ["damaged: path x, reason y"]
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"event": "sav')  # the disk was full
    events("saved", step=4)
    assert json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])["step"] == 4
    Events(tmp_path, say=said.append)("damaged")  # a folder is in the way, as on a full disk: said, not raised
    assert "cannot be written" in said[1]


def test_line() -> None:
    row = {"step": 3, "loss": 1.23456, "lr": 0.001, "views_per_s": 12345.6, "step_s": 1.0, "data_wait_s": 0.4}
    assert line(row, 9) == "step 3/9  loss 1.235  lr 0.001  views_per_s 12346  data 0.40 s"
    assert figure(0.00012346) == "0.0001235"


def test_embedding_figures_equal_plain_loops() -> None:
    torch.manual_seed(0)
    embeddings = torch.randn(12, 2, 5)
    unit = [[[x / math.hypot(*z) for x in z] for z in pair] for pair in embeddings.tolist()]

    def squared(a: list[float], b: list[float]) -> float:
        return sum((x - y) ** 2 for x, y in zip(a, b))

    found = describe(embeddings)
    assert float(found["alignment"]) == pytest.approx(sum(squared(*pair) for pair in unit) / 12, rel=1e-5)
    pairs = [squared(a[0], b[0]) for a, b in itertools.permutations(unit, 2)]
    expected = math.log(sum(math.exp(-2 * value) for value in pairs) / len(pairs))
    assert float(found["uniformity"]) == pytest.approx(expected, rel=1e-5)


def test_effective_rank_of_known_matrices() -> None:
    orthogonal = torch.linalg.qr(torch.randn(8, 8))[0]
    assert float(effective_rank(orthogonal)) == pytest.approx(8, rel=1e-4)
    assert float(effective_rank(orthogonal[:, :3])) == pytest.approx(3, rel=1e-4)
    assert float(effective_rank(torch.ones(6, 4))) == pytest.approx(1, abs=1e-3)
    assert float(uniformity(torch.ones(5, 1))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_embeddings_that_are_not_finite_are_described(bad: float) -> None:
    """The step is skipped and the run goes on: looking at it must not end it."""
    embeddings = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(0))
    embeddings[2] = bad
    assert all(figure.isnan() for figure in describe(embeddings).values())
