"""Staging: fetched once, checked, kept under a limit; stalls, failures and full disks end in a clear error in time."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from test_shards import parts_of, write

from pretrain.data.index import ShardIndex
from pretrain.data.shards import DamagedSample, ShardReader
from pretrain.data.staging import ShardChangedError, Staging, StagingError, open_stream


def shard(folder: Path, name: str = "a.tar", size: int = 200_000) -> dict[str, Any]:
    """A file and what the index knows of it."""
    content = bytes(hashlib.sha256(name.encode()).digest() * (size // 32))
    (folder / name).write_bytes(content)
    return {"num_bytes": len(content), "sha256": hashlib.sha256(content).digest()}


def counting(folder: Path, name: str) -> str:
    """A URL whose fetches are counted in the file `log`."""
    return f"pipe:echo x >> {folder}/log; cat {folder}/{name}"


def test_a_shard_is_fetched_once_and_whole(tmp_path: Path) -> None:
    known = shard(tmp_path)
    staging = Staging(tmp_path / "cache")
    paths = {staging.path(counting(tmp_path, "a.tar"), **known) for _ in range(3)}
    again = pickle.loads(pickle.dumps(staging))
    paths.add(again.path(counting(tmp_path, "a.tar"), **known))
    assert len(paths) == 1
    assert paths.pop().read_bytes() == (tmp_path / "a.tar").read_bytes()
    assert (tmp_path / "log").read_text() == "x\n"


def _fetch(folder: Path, known: dict[str, Any], results: Any) -> None:
    staging = Staging(folder / "cache")
    slow = f"pipe:echo x >> {folder}/log; sleep 0.3; cat {folder}/a.tar"
    results.put(staging.path(slow, **known).stat().st_size)


def test_processes_that_need_it_at_once_fetch_it_once(tmp_path: Path) -> None:
    known = shard(tmp_path)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_fetch, args=(tmp_path, known, results)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [known["num_bytes"]] * 4
    for process in processes:
        process.join()
    assert (tmp_path / "log").read_text() == "x\n"


def test_a_killed_fetch_leaves_nothing_that_counts(tmp_path: Path) -> None:
    known = shard(tmp_path)
    context = multiprocessing.get_context("fork")

    def stall() -> None:
        url = f"pipe:head -c 1000 {tmp_path}/a.tar; sleep 60"
        Staging(tmp_path / "cache").path(url, **known)

    process = context.Process(target=stall)
    process.start()
    deadline = time.monotonic() + 30
    while not any(path.stat().st_size for path in (tmp_path / "cache").glob(".*.part")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    path = Staging(tmp_path / "cache").path(f"pipe:cat {tmp_path}/a.tar", **known)
    assert path.read_bytes() == (tmp_path / "a.tar").read_bytes()


def test_least_recently_used_leaves_first_and_readers_keep_their_bytes(tmp_path: Path) -> None:
    known = {name: shard(tmp_path, name, 100_000) for name in ("a.tar", "b.tar", "c.tar")}
    staging = Staging(tmp_path / "cache", limit_bytes=250_000)
    url = {name: f"pipe:cat {tmp_path}/{name}" for name in known}
    a = staging.path(url["a.tar"], **known["a.tar"])
    b = staging.path(url["b.tar"], **known["b.tar"])
    os.utime(a, ns=(1, 1)), os.utime(b, ns=(2, 2))
    staging.path(url["a.tar"], **known["a.tar"])  # used now
    with open(b, "rb") as held:
        c = staging.path(url["c.tar"], **known["c.tar"])
        assert (a.exists(), b.exists(), c.exists()) == (True, False, True)
        assert held.read() == (tmp_path / "b.tar").read_bytes()


def test_room_is_made_of_staged_shards_alone(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    others = [cache / name for name in ("index-1971392be7957df6.safetensors", "thesis.tex", "0123456789.tar")]
    for other in others:
        other.write_bytes(b"x" * 200_000)
        os.utime(other, ns=(1, 1))
    staging = Staging(cache, limit_bytes=250_000)
    staged = [staging.path(f"pipe:cat {tmp_path}/{name}", **shard(tmp_path, name)) for name in ("a.tar", "b.tar")]
    assert [path.exists() for path in (*others, *staged)] == [True, True, True, False, True]


def test_a_stalled_read_is_an_error_in_time_and_its_processes_end(tmp_path: Path) -> None:
    known = shard(tmp_path)
    staging = Staging(tmp_path / "cache", timeout_s=0.3, retries=1)
    start = time.monotonic()
    with pytest.raises(StagingError, match=r"no byte for 0 s.*after 2 attempts"):
        staging.path(f"pipe:head -c 1000 {tmp_path}/a.tar; sleep 987", **known)
    assert time.monotonic() - start < 15
    deadline = time.monotonic() + 10  # a killed process stays in the table until it is reaped
    while _runs(b"sleep\x00987"):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(command: bytes) -> bool:
    """Whether a process with this command line exists."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if command in path.read_bytes():
                return True
        except OSError:
            continue
    return False


def test_failures_are_tried_again(tmp_path: Path) -> None:
    known = shard(tmp_path)
    flaky = f"pipe:echo x >> {tmp_path}/log; test $(wc -l < {tmp_path}/log) -ge 3 && cat {tmp_path}/a.tar"
    staging = Staging(tmp_path / "cache", timeout_s=1, retries=2)
    assert staging.path(flaky, **known).exists()
    with pytest.raises(StagingError, match=r"cannot fetch .*exit status 7.* after 3 attempts; check the network"):
        staging.path("pipe:exit 7", **known)


def test_another_shard_than_the_indexed_one_is_refused(tmp_path: Path) -> None:
    known = shard(tmp_path)
    shard(tmp_path, "b.tar")
    staging = Staging(tmp_path / "cache", timeout_s=1, retries=0)
    with pytest.raises(ShardChangedError, match="its size or checksum differs"):
        staging.path(f"pipe:cat {tmp_path}/b.tar", **known)
    with pytest.raises(StagingError, match="ended after 5 of"):
        staging.path("pipe:printf 12345", **known)
    with pytest.raises(ShardChangedError):
        staging.path("pipe:yes", **known)  # endless: stopped at the size that is known


def test_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = shard(tmp_path)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    staging = Staging(tmp_path / "cache", retries=5)
    monkeypatch.setattr(staging, "_fetch", full)
    with pytest.raises(StagingError, match=r"No space left on device; free some space, lower loading\.cache_gb"):
        staging.path("pipe:cat /dev/null", **known)


def test_prefetching_runs_ahead_and_reports_at_use(tmp_path: Path) -> None:
    known = shard(tmp_path)
    staging = Staging(tmp_path / "cache", timeout_s=1, retries=0)
    staging.prefetch(counting(tmp_path, "a.tar"), **known)
    deadline = time.monotonic() + 30
    while not list((tmp_path / "cache").glob("[!.]*")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    staging.path(counting(tmp_path, "a.tar"), **known)
    assert (tmp_path / "log").read_text() == "x\n"
    staging.prefetch("pipe:exit 3", num_bytes=5, sha256=bytes(32))
    with pytest.raises(StagingError, match="exit status 3"):
        staging.path("pipe:exit 3", num_bytes=5, sha256=bytes(32))
    staging.close()


def test_what_failed_ahead_is_fetched_at_use_or_ahead_again(tmp_path: Path) -> None:
    known = shard(tmp_path)
    flaky = f"pipe:echo x >> {tmp_path}/log; test $(wc -l < {tmp_path}/log) -ge 2 && cat {tmp_path}/a.tar"
    for use in ("path", "prefetch"):
        (tmp_path / "log").unlink(missing_ok=True)
        staging = Staging(tmp_path / use, timeout_s=1, retries=0)
        staging.prefetch(flaky, **known)
        while not all(future.done() for future in staging._pending.values()):
            time.sleep(0.01)
        getattr(staging, use)(flaky, **known)
        staging._pool.shutdown()  # type: ignore[union-attr]
        assert list((tmp_path / use).glob("[!.]*a.tar"))


def test_a_process_that_only_prefetches_does_so_in_every_epoch_and_keeps_no_books(tmp_path: Path) -> None:
    """As the trainer does whose workers read: 3 epochs of 40 shards through a folder that holds five."""
    known = {f"{number:02d}.tar": shard(tmp_path, f"{number:02d}.tar", 1600) for number in range(40)}
    staging = Staging(tmp_path / "cache", limit_bytes=5 * 1600, timeout_s=5, retries=0)
    for _ in range(3):
        for name, identity in known.items():
            staging.prefetch(f"pipe:echo {name} >> {tmp_path}/log; cat {tmp_path}/{name}", **identity)
            deadline = time.monotonic() + 60
            while not list((tmp_path / "cache").glob(f"*{name}")):
                assert time.monotonic() < deadline
                time.sleep(0.002)
            assert len(staging._pending) <= 2
    fetched = (tmp_path / "log").read_text().split()
    assert all(fetched.count(name) == 3 for name in known)
    assert len(list((tmp_path / "cache").glob("[!.]*"))) <= 5
    staging.close()


def test_a_remote_set_is_indexed_in_one_pass_and_read_through_the_cache(tmp_path: Path) -> None:
    write(tmp_path / "far")
    location = f"pipe:cat {tmp_path}/far/{{000..002}}.tar"
    index = ShardIndex.open(location, cache_dir=tmp_path / "cache")
    reader = ShardReader(index, Staging(tmp_path / "cache" / "shards", timeout_s=5, retries=0))
    reader.prefetch(range(3))
    assert all(reader.read(n) == parts_of(n // 5, n % 5) for n in (14, 0, 7))
    (tmp_path / "far" / "001.tar").write_bytes((tmp_path / "far" / "002.tar").read_bytes())
    fresh = ShardReader(index, Staging(tmp_path / "cache2", timeout_s=5, retries=0))
    with pytest.raises(DamagedSample, match=r"001.tar: s1-0: .* its size or checksum differs"):
        fresh.read(5)


def test_local_files_are_plain_streams(tmp_path: Path) -> None:
    shard(tmp_path)
    with open_stream(f"file:{tmp_path}/a.tar") as stream:
        assert len(stream.read(10)) == 10
