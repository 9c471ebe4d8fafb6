"""The loader's stream: one and the same, whatever ranks, workers, kills, memory and lanes."""

from __future__ import annotations

import io
import json
import random
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import loader_process
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loader_process import SEED, SIMCLR, line
from loader_sets import SIZES, STEPS, joined, make_loader, png, write_set

from configs.errors import UserError
from configs.schema import Views
from pretrain.data.order import Order
from pretrain.data.shards import ShardWriter
from pretrain.data.views import SimclrTransform


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("loader") / "set")


@pytest.fixture(scope="module")
def stream(shards: Path) -> list[dict[str, Any]]:
    """The undisturbed stream, by one process without workers."""
    loader = make_loader(shards)
    return [line(loader, step) for step in range(STEPS)]


def test_epochs_hold_every_sample_once(stream: list[dict[str, Any]]) -> None:
    samples = [sample for step in stream for sample in step["samples"]]
    assert sorted(samples[: sum(SIZES)]) == list(range(sum(SIZES)))
    assert sorted(samples[sum(SIZES) : 2 * sum(SIZES)]) == list(range(sum(SIZES)))


def views_of(epoch: int, sample: int) -> np.ndarray:
    """By the transform alone."""
    draws = SIMCLR.draws(np.array([epoch]), np.array([sample]))[0]
    return SIMCLR({"png": png(sample)}, draws)()["images"]


def test_views_are_those_of_their_samples(shards: Path) -> None:
    """The pixels of a row are what the transform makes of the sample that the row names."""
    batch = make_loader(shards)[1]
    for row in range(len(batch)):
        epoch, sample = int(batch.epochs[row]), int(batch.samples[row])
        assert np.array_equal(batch.tensors["images"][row].numpy(), views_of(epoch, sample))


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


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (("{:09d}.jpg", "{:09d}.txt", "{:09d}.json"), {}),  # img2dataset
        (("n01/{:06d}.jpeg", "n01/{:06d}.cls"), {}),  # timm, webdataset
        (("img.v2.{:04d}.picture", "img.v2.{:04d}.meta"),
         {"key_pattern": r"(?P<key>.+)\.(?P<part>[^.]+)", "parts": {"image": "jpg;picture"}}),
    ],
    ids=["img2dataset", "timm", "another"],
)  # fmt: skip
def test_shards_made_by_others(tmp_path: Path, names: tuple[str, ...], options: dict[str, Any]) -> None:
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard:05d}.tar", "w") as tar:
            for number in range(12 * shard, 12 * shard + 12):
                for name, content in zip(names, (png(number), b"1", b"{}")):
                    info = tarfile.TarInfo(name.format(number))
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    loader = make_loader(tmp_path, **options)
    seen = {}
    for batch in (loader[0], loader[1]):
        seen |= dict(zip(batch.samples.tolist(), zip(batch.epochs.tolist(), batch.tensors["images"].numpy())))
    assert sorted(seen) == list(range(24))
    for sample, (epoch, views) in seen.items():
        assert np.array_equal(views, views_of(epoch, sample))


def test_a_batch_that_ranks_do_not_divide_is_refused(shards: Path) -> None:
    with pytest.raises(UserError, match="batch_size=12 is not a multiple of the 5 processes"):
        make_loader(shards, world_size=5)


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
