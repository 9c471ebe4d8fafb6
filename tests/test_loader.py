"""The loader: one stream, whatever ranks, workers, kills and damage; errors in time, and no hang."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import loader_process
import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loader_process import BATCH_SIZE, SEED, SIMCLR, Failing, Stalling, line
from PIL import Image

from configs.errors import UserError
from configs.schema import Data, Loading, Views
from pretrain.data import fetch
from pretrain.data.loader import Loader
from pretrain.data.order import Order
from pretrain.data.shards import ShardWriter
from pretrain.data.views import SimclrTransform
from pretrain.data.workers import LoaderError

SIZES = (9, 4, 1, 13, 8)  # samples of the shards: of different sizes, more than one epoch in three batches
STEPS = 9


def png(number: int, side: int = 20) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_set(folder: Path, *, broken: tuple[int, ...] = (), sides: Callable[[int], int] = lambda number: 20) -> Path:
    folder.mkdir(parents=True)
    number = 0
    for shard, size in enumerate(SIZES):
        with ShardWriter(folder / f"set-{shard:03d}.tar") as writer:
            for _ in range(size):
                content = b"no image" if number in broken else png(number, sides(number))
                writer.write(f"{number:06d}", {"png": content, "cls": b"%d" % number})
                number += 1
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("loader") / "set")


def make_loader(shards: Path, *, workers: int = 0, transform: Any = SIMCLR, **options: Any) -> Loader:
    data = {"window": 2} | {key: options.pop(key) for key in ("keep", "max_broken", "lanes") if key in options}
    loading = {"workers": workers} | {key: options.pop(key) for key in ("prefetch", "timeout_s") if key in options}
    options = {"seed": SEED, "batch_size": BATCH_SIZE} | options
    return Loader(Data(shards=str(shards), **data), Loading(**loading), transform, **options)


@pytest.fixture(scope="module")
def stream(shards: Path) -> list[dict[str, Any]]:
    """The undisturbed stream, by one process without workers."""
    loader = make_loader(shards)
    return [line(loader, step) for step in range(STEPS)]


def joined(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """One step of all ranks as one process would have it."""
    return {
        key: value if key == "step" else [item for part in lines for item in part[key]]
        for key, value in lines[0].items()
    }


def run(loader: Loader, steps: int = STEPS) -> None:
    for step in range(steps):
        loader[step]


def test_epochs_hold_every_sample_once(stream: list[dict[str, Any]]) -> None:
    samples = [sample for step in stream for sample in step["samples"]]
    assert sorted(samples[: sum(SIZES)]) == list(range(sum(SIZES)))
    assert sorted(samples[sum(SIZES) : 2 * sum(SIZES)]) == list(range(sum(SIZES)))


def test_views_are_those_of_their_samples(shards: Path) -> None:
    """The pixels of a row are what the transform makes of the sample that the row names."""
    batch = make_loader(shards)[1]
    for row in range(len(batch)):
        epoch, sample = int(batch.epochs[row]), int(batch.samples[row])
        expected = SIMCLR({"png": png(sample)}, epoch, sample, 0)["images"]
        assert np.array_equal(batch.tensors["images"][row].numpy(), expected)


@pytest.mark.parametrize(
    ("world_size", "workers", "prefetch", "keep"),
    [
        (1, 1, 1, "disk"),
        (1, 3, 2, "disk"),
        (2, 0, 1, "disk"),
        (3, 2, 3, "disk"),
        (4, 0, 1, "memory"),
        (2, 2, 1, "memory"),
    ],
)
def test_the_stream_is_the_same(
    shards: Path, stream: list[dict[str, Any]], world_size: int, workers: int, prefetch: int, keep: str
) -> None:
    options = {"workers": workers, "prefetch": prefetch, "keep": keep, "world_size": world_size}
    loaders = [make_loader(shards, rank=rank, **options) for rank in range(world_size)]
    for step in range(STEPS):
        assert joined([line(loader, step) for loader in loaders]) == stream[step]
    for loader in loaders:
        loader.close()


@settings(max_examples=8)
@given(st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(1, 4)), min_size=1, max_size=4))
def test_changing_the_world_size_on_the_way_changes_nothing(
    shards: Path, stream: list[dict[str, Any]], lives: list[tuple[int, int]]
) -> None:
    step = 0
    for world_size, length in lives:
        loaders = [make_loader(shards, rank=rank, world_size=world_size) for rank in range(world_size)]
        for _ in range(min(length, STEPS - step)):
            assert joined([line(loader, step) for loader in loaders]) == stream[step]
            step += 1


@pytest.mark.parametrize(
    "lives",
    [[(2, 1), (1, 0)], pytest.param([(2, 1), (1, 2), (3, 0), (4, 1), (2, 0), (1, 0)], marks=pytest.mark.slow)],
    ids=["short", "long"],
)
def test_killed_processes_continue_the_stream_at_any_world_size(
    shards: Path, tmp_path: Path, lives: list[tuple[int, int]]
) -> None:
    """Real processes with (ranks, workers), killed at random moments, started again with others."""
    rng, steps, seen = random.Random(0), 100, {}
    reference = make_loader(shards)
    start = 0
    for life, (world_size, workers) in enumerate(lives):
        files = [tmp_path / f"{life}-{rank}.jsonl" for rank in range(world_size)]
        arguments = [[shards, file, rank, world_size, workers, start, steps] for rank, file in enumerate(files)]
        processes = [
            subprocess.Popen([sys.executable, loader_process.__file__, *map(str, chosen)]) for chosen in arguments
        ]
        if life < len(lives) - 1:
            while not all(file.exists() and file.stat().st_size for file in files):
                time.sleep(0.02)
            time.sleep(rng.random() * 0.1)
            for process in processes:
                process.send_signal(signal.SIGKILL)
        for process in processes:
            process.wait(300)
        ranks = [[json.loads(text) for text in file.read_text().splitlines() if text.endswith("}")] for file in files]
        for parts in zip(*ranks):
            seen[parts[0]["step"]] = joined(list(parts))
        start = max(seen) + 1
    assert sorted(seen) == list(range(steps))
    for step in range(steps):
        assert seen[step] == line(reference, step)


def test_any_step_can_be_asked_for(shards: Path, stream: list[dict[str, Any]]) -> None:
    loader = make_loader(shards, workers=2)
    for step in (3, 4, 0, 8, 8, 1):
        assert line(loader, step) == stream[step]
    loader.close()


def test_batches_keep_their_content(shards: Path) -> None:
    """Slots of shared memory are filled again; what was handed out stays."""
    loader = make_loader(shards, workers=1, prefetch=1)
    batch = loader[0]
    before = zlib.crc32(batch.tensors["images"].numpy().tobytes())
    for step in range(1, 6):
        loader[step]
    assert zlib.crc32(batch.tensors["images"].numpy().tobytes()) == before
    loader.close()


def test_kept_on_the_device_views_differ_by_a_level_at_most(shards: Path) -> None:
    on_disk, on_device = make_loader(shards), make_loader(shards, keep="device")
    for step in range(3):
        ours, theirs = on_device[step], on_disk[step]
        assert torch.equal(ours.samples, theirs.samples)
        assert (ours.tensors["images"].int() - theirs.tensors["images"].int()).abs().max() <= 1


def test_images_of_different_sizes_are_kept_in_memory_but_not_on_the_device(tmp_path: Path) -> None:
    shards = write_set(tmp_path / "set", sides=lambda number: 18 + number % 5)
    assert line(make_loader(shards, keep="memory"), 2) == line(make_loader(shards), 2)
    with pytest.raises(UserError, match="images of one size"):
        make_loader(shards, keep="device")


@pytest.mark.parametrize("keep", ["disk", "memory", "device"])
def test_a_sample_without_an_image_is_replaced(tmp_path: Path, keep: str) -> None:
    (tmp_path / "set").mkdir()
    with ShardWriter(tmp_path / "set" / "set-000.tar") as writer:
        for number in range(24):
            writer.write(f"{number:06d}", {"cls": b"1"} if number == 5 else {"png": png(number), "cls": b"1"})
    loader = make_loader(tmp_path / "set", keep=keep, max_broken=0.1)
    samples = [sample for step in range(2) for sample in loader[step].samples.tolist()]
    assert set(range(24)) - set(samples) == {5}
    assert [entry.reason for entry in loader.ledger.broken.values()] == ["no image among its parts"]


def test_large_views_are_the_same_from_memory(shards: Path) -> None:
    """Above crop.NATIVE_UP_TO, where torch resizes."""
    transform = SimclrTransform(Views(size=70), SEED)
    first, second = make_loader(shards, transform=transform), make_loader(shards, transform=transform, keep="memory")
    assert torch.equal(first[0].tensors["images"], second[0].tensors["images"])


def test_lanes_give_one_stream_at_any_world_size(shards: Path) -> None:
    loader = make_loader(shards, lanes=3)
    parts = [make_loader(shards, lanes=3, rank=rank, world_size=3) for rank in range(3)]
    touched = [set(), set(), set()]
    for step in range(STEPS):
        lines = [line(part, step) for part in parts]
        assert joined(lines) == line(loader, step)
        for rank in range(3):
            touched[rank] |= set(loader.index.shard_of(np.array(lines[rank]["samples"])).tolist())
    assert sum(map(len, touched)) == len(SIZES)  # a rank reads its lane's shards alone


# Broken samples and shards


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("loader") / "damaged", broken=(3, 17, 20))


@pytest.mark.parametrize(("world_size", "workers", "keep"), [(1, 2, "disk"), (3, 0, "disk"), (2, 0, "memory")])
def test_broken_samples_are_replaced_alike_everywhere(
    damaged: Path, tmp_path: Path, world_size: int, workers: int, keep: str
) -> None:
    expected = make_loader(damaged, max_broken=0.5)
    options = {"workers": workers, "keep": keep, "max_broken": 0.5, "world_size": world_size}
    ledger = tmp_path / "skipped.jsonl"
    loaders = [make_loader(damaged, rank=rank, ledger=ledger, **options) for rank in range(world_size)]
    for step in range(STEPS):
        whole = line(expected, step)
        assert not {3, 17, 20} & set(whole["samples"])
        assert joined([line(loader, step) for loader in loaders]) == whole
    entries = [json.loads(text) for text in ledger.read_text().splitlines()]
    assert sorted(entry["sample"] for entry in entries) == [3, 17, 20]
    by_sample = {entry["sample"]: entry for entry in entries}
    assert by_sample[17] == {
        "sample": 17,
        "shard": "set-003.tar",
        "key": "000017",
        "reason": "no image format known begins with 6e 6f 20 69 6d 61 67 65",
    }
    for loader in loaders:
        loader.close()


def test_a_replacement_is_a_function_of_the_sample(damaged: Path) -> None:
    batch = make_loader(damaged, max_broken=0.5)[0]
    order = Order(np.array(SIZES), seed=SEED, window=2)
    for position, used in enumerate(batch.samples.tolist()):
        epoch, planned = (int(values[0]) for values in order.at(np.array([position])))
        tries = [planned, *(fetch.replacement(SEED, epoch, planned, attempt, sum(SIZES)) for attempt in range(5))]
        assert used == next(sample for sample in tries if sample not in (3, 17, 20))


def test_too_many_broken_samples_stop_the_run(damaged: Path, tmp_path: Path) -> None:
    loader = make_loader(damaged, max_broken=0.01, ledger=tmp_path / "skipped.jsonl")
    with pytest.raises(UserError, match=r"more than data\.max_broken=0\.01 allows.*skipped\.jsonl.*--verify"):
        run(loader)


def test_a_shard_that_goes_missing_or_is_cut_is_named(tmp_path: Path) -> None:
    shards = write_set(tmp_path / "set")
    loader = make_loader(shards, max_broken=1.0, ledger=tmp_path / "skipped.jsonl")
    loader._files.close()  # a shard that is open would go on being read
    (shards / "set-000.tar").unlink()
    os.truncate(shards / "set-003.tar", 600)
    for step in range(STEPS):
        loader[step]
    entries = [json.loads(text) for text in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    reasons = {entry["shard"]: entry["reason"] for entry in entries}
    assert reasons == {
        "set-000.tar": "No such file or directory",
        "set-003.tar": "the shard is shorter than when it was indexed",
    }
    assert {entry["sample"] for entry in entries} <= {*range(9), *range(14, 27)}


def test_a_shard_cut_between_two_lives_of_a_run(tmp_path: Path) -> None:
    """Refused where it holds more than data.max_broken allows; else said, and its samples are replaced."""
    shards = write_set(tmp_path / "set")
    make_loader(shards)
    os.truncate(shards / "set-003.tar", 600)
    with pytest.raises(UserError, match=r"set-003\.tar has 600 bytes.*changed since it was indexed"):
        make_loader(shards, max_broken=0.3)
    with pytest.warns(UserWarning, match=r"1 shards changed since they were indexed \(set-003\.tar\)"):
        loader = make_loader(shards, max_broken=0.4)
    assert loader.index.shard_of(loader[0].samples.numpy()).tolist().count(3) == 0


def test_a_ledger_lists_a_sample_once_over_restarts(damaged: Path, tmp_path: Path) -> None:
    for _ in range(2):
        loader = make_loader(damaged, max_broken=0.5, ledger=tmp_path / "skipped.jsonl")
        for step in range(STEPS):
            loader[step]
        assert loader.skipped == 3
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 3


def test_a_set_of_nothing_but_broken_samples_is_refused(tmp_path: Path) -> None:
    shards = write_set(tmp_path / "set", broken=tuple(range(sum(SIZES))))
    with pytest.raises(UserError, match=r"samples in a row are broken.*no image format known"):
        make_loader(shards)


# No hangs


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


# What cannot work, and what must not grow


def test_a_batch_that_ranks_do_not_divide_is_refused(shards: Path) -> None:
    with pytest.raises(UserError, match="batch_size=12 is not a multiple of the 5 processes"):
        make_loader(shards, world_size=5)


def test_waiting_and_advice(loader: Loader) -> None:
    loader[0]
    assert loader.wait_s > 0
    assert "data is the bottleneck" in loader.advice()


def test_a_month_of_steps_leaves_memory_flat(shards: Path) -> None:
    """Order and bookkeeping of 130,000 shards at steps spread over a month, and batches of a small set."""
    order = Order(np.full(130_000, 10_000), seed=0, window=16)
    loader = make_loader(shards)

    def live(steps: range) -> int:
        for step in steps:
            order.at(np.arange(256) + step * 50_000_000)
            order.coming_shards(step * 50_000_000, 32)
            loader[step]
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = live(range(15))
        assert live(range(15, 60)) - before < 200_000
    finally:
        tracemalloc.stop()
