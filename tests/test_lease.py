"""Who may write: the youngest life of a run, and only it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.errors import UserError
from pretrain import lease
from pretrain.lease import Fenced, Lease, living_owner, next_generation, read_owner

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.02)
    monkeypatch.delenv("AKORN_GENERATION", raising=False)


def test_older_life_notices_and_may_write_no_more(tmp_path: Path) -> None:
    older, younger = Lease(tmp_path, 1), Lease(tmp_path, 2)
    older.take()
    older.watch()
    older.check()
    assert not older.lost
    younger.take()
    with pytest.raises(Fenced):
        older.check()
    deadline = time.monotonic() + 5
    while not older.lost:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    older.close()
    owner = read_owner(tmp_path)
    assert owner is not None
    assert (owner.generation, owner.pid) == (2, os.getpid())
    younger.check()


def test_older_life_that_comes_late_takes_nothing(tmp_path: Path) -> None:
    Lease(tmp_path, 5).take()
    with pytest.raises(Fenced):
        Lease(tmp_path, 4).take()


def test_second_start_says_where_the_run_is_running(tmp_path: Path) -> None:
    first = Lease(tmp_path, next_generation(tmp_path))
    first.take()
    with pytest.raises(UserError, match=f"running already.*process {os.getpid()}"):
        next_generation(tmp_path)
    first.close()
    assert living_owner(tmp_path) is None
    assert next_generation(tmp_path) == 2


def test_dead_owner_is_no_obstacle(tmp_path: Path) -> None:
    code = f"from pathlib import Path; from pretrain.lease import Lease; Lease(Path({str(tmp_path)!r}), 3).take()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert read_owner(tmp_path) is not None
    assert living_owner(tmp_path) is None
    assert next_generation(tmp_path) == 4


def test_launcher_gives_the_generation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AKORN_GENERATION", "17")
    Lease(tmp_path, 3).take()
    assert next_generation(tmp_path) == 17


def test_silent_owner_on_another_host_counts_as_dead(tmp_path: Path) -> None:
    Lease(tmp_path, 1).take()
    file = tmp_path / "owner.json"
    file.write_text(file.read_text().replace(lease.socket.gethostname(), "elsewhere"))
    assert living_owner(tmp_path) is not None
    long_ago = time.time() - 2 * lease.STALE_S
    os.utime(file, (long_ago, long_ago))
    assert living_owner(tmp_path) is None


def test_one_rank_of_a_node_looks_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RARE_S", 60.0)
    first, second = Lease(tmp_path, 1), Lease(tmp_path, 1)
    first.take()
    looks = dict.fromkeys((first, second), 0)
    check = Lease.check

    def counted(self: Lease) -> None:
        looks[self] += 1
        check(self)

    monkeypatch.setattr(Lease, "check", counted)
    first.watch()
    second.watch(often=False)
    deadline = time.monotonic() + 5
    while looks[first] < 5:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert looks[second] == 0
    first.close()
    second.close()


@pytest.mark.parametrize("often", [True, False])
def test_stuck_process_is_ended(tmp_path: Path, often: bool) -> None:
    beat, unused = ("BEAT_S", "RARE_S") if often else ("RARE_S", "BEAT_S")
    code = (
        "import sys, time; from pathlib import Path; from pretrain import lease\n"
        f"lease.{beat} = lease.GRACE_S = 0.05; lease.{unused} = 600\n"
        f"own = lease.Lease(Path(sys.argv[1]), 1); own.take(); own.watch(often={often}); print('ready', flush=True)\n"
        "time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    Lease(tmp_path, 2).take()
    _, error = process.communicate(timeout=30)
    assert process.returncode == lease.EXIT_FENCED
    assert "replaced by a younger one" in error
