"""Loader processes: dead, stalled, defective or orphaned, the run is told in time and nothing hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import loader_process
import psutil
import pytest
import torch
from loader_process import Failing, Stalling
from loader_sets import make_loader, run, write_set

from configs.schema import Loading
from pretrain.data import loader as loading
from pretrain.data.loader import Loader
from pretrain.data.workers import LoaderError


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("loader") / "set")


def workers_of(process: int) -> list[psutil.Process]:
    """The loader workers that belong to a process, through the fork server."""
    children = psutil.Process(process).children(recursive=True)
    return [child for child in children if "forkserver" in " ".join(child.cmdline()) and child.ppid() != process]


@pytest.fixture
def loader(shards: Path) -> Iterator[Loader]:
    loader = make_loader(shards, workers=2)
    yield loader
    loader.close()


def test_a_killed_worker_is_an_error_with_its_cause(loader: Loader) -> None:
    loader[0]
    assert loader._pool is not None
    victim = loader._pool._processes[1]
    os.kill(victim.pid or 0, signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(LoaderError, match=rf"worker 1 \(process {victim.pid}\) died: killed by SIGKILL"):
        run(loader, 20)
    assert time.monotonic() - begin < 10


def test_a_stalled_worker_is_an_error_that_names_the_sample(shards: Path) -> None:
    loader = make_loader(shards, workers=2, transform=Stalling(sample=20), timeout_s=1.0)
    begin = time.monotonic()
    with pytest.raises(LoaderError, match=r"no data for 1 s; worker \d .* at shard set-003\.tar, key 000020"):
        run(loader, 4)
    assert time.monotonic() - begin < 20
    loader.close()


def test_a_defect_in_a_worker_comes_with_its_traceback(shards: Path) -> None:
    loader = make_loader(shards, workers=2, transform=Failing(sample=20))
    with pytest.raises(LoaderError, match=r"(?s)shard set-003\.tar, key 000020.*ZeroDivisionError"):
        run(loader, 4)
    loader.close()


def test_signals_of_the_job_leave_workers_alone(loader: Loader) -> None:
    assert loader._pool is not None
    loader[0]
    for process in loader._pool._processes:
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            os.kill(process.pid or 0, number)
    for step in range(1, 8):
        loader[step]


def test_closing_ends_the_workers(shards: Path) -> None:
    loader = make_loader(shards, workers=2)
    loader[0]
    assert loader._pool is not None
    pids = [process.pid for process in loader._pool._processes]
    loader.close()
    loader.close()
    assert not any(psutil.pid_exists(pid) for pid in pids if pid)


def test_workers_end_with_their_trainer(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [shards, out, 0, 1, 2, 0, 10**6]
    process = subprocess.Popen([sys.executable, loader_process.__file__, *map(str, arguments)])
    while not out.exists() or not out.stat().st_size:
        time.sleep(0.05)
    workers = workers_of(process.pid)
    assert len(workers) == 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive


def test_waiting_and_advice(loader: Loader) -> None:
    loader[0]
    assert loader.wait_s > 0
    assert "data is the bottleneck" in loader.advice()


@pytest.mark.parametrize(("own", "workers"), [("12", 11), ("", 3)])
def test_cores_that_a_process_has_for_itself_are_not_shared_again(
    own: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight processes on a node; SLURM binds each to 12 cores, or all of them see the same 32."""
    seen = set(range(int(own or "32")))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: seen)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("AKORN_CORES", own)
    assert loading._num_workers(Loading(), torch.device("cuda")) == workers
