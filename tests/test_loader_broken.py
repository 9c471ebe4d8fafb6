"""Broken samples and shards: replaced alike everywhere, named once, and not too many of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from loader_process import SEED, line
from loader_sets import SIZES, STEPS, joined, make_loader, png, run, write_set
from test_tar import archive

from configs.errors import UserError
from pretrain.data import fetch
from pretrain.data.location import Location
from pretrain.data.order import Order
from pretrain.distributed import join, leave, once
from tests.standin import run_ranks


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


def test_blocks_of_samples_change_nothing(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [line(make_loader(damaged, max_broken=0.5), step) for step in range(2)]
    monkeypatch.setattr(fetch, "BLOCK", 5)
    assert [line(make_loader(damaged, max_broken=0.5), step) for step in range(2)] == whole


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


def _refused(shards: str) -> tuple[str, int]:
    """What a rank says of a set that changed, and how many shards it has looked at."""
    ranks, looked = join(), 0
    local_sizes = Location.local_sizes

    def counted(location: Location) -> Iterator[tuple[int, int]]:
        nonlocal looked
        looked += len(location)
        return local_sizes(location)

    place = {"rank": ranks.rank, "world_size": ranks.world_size, "once": partial(once, ranks=ranks)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Location, "local_sizes", counted)
        with pytest.raises(UserError) as caught:
            make_loader(Path(shards), max_broken=0.3, **place)
    leave()
    return str(caught.value), looked


def test_one_rank_looks_at_the_shards_and_all_refuse(tmp_path: Path) -> None:
    shards = write_set(tmp_path / "set")
    make_loader(shards)
    os.truncate(shards / "set-003.tar", 600)
    (said, looked), (said_too, looked_too) = run_ranks(2, _refused, tmp_path / "out", str(shards))
    assert "set-003.tar has 600 bytes" in said
    assert said_too == said
    assert looked > 0
    assert looked_too == 0


def test_a_ledger_lists_a_sample_once_over_restarts(damaged: Path, tmp_path: Path) -> None:
    ledger = tmp_path / "skipped.jsonl"
    ledger.write_text('{"sample": 12')  # cut short by a full disk
    for _ in range(2):
        loader = make_loader(damaged, max_broken=0.5, ledger=ledger)
        for step in range(STEPS):
            loader[step]
        assert len(loader.ledger.broken) == 3
    cut, *entries = ledger.read_text().splitlines()
    assert cut == '{"sample": 12'
    assert {json.loads(entry)["sample"] for entry in entries} == set(loader.ledger.broken)
    assert len(entries) == 3


def test_a_set_of_nothing_but_broken_samples_is_refused(tmp_path: Path) -> None:
    shards = write_set(tmp_path / "set", broken=tuple(range(sum(SIZES))))
    with pytest.raises(UserError, match=r"samples in a row are broken.*no image format known"):
        make_loader(shards)


def test_a_set_without_a_known_image_is_refused_and_its_parts_are_named(tmp_path: Path) -> None:
    files = [(f"{number:03d}.{part}", png(number)) for number in range(12) for part in ("left.jpg", "right.jpg")]
    (tmp_path / "set.tar").write_bytes(archive(files))
    with pytest.raises(
        UserError, match=r"the samples have left\.jpg, right\.jpg; say which of them it is in data.parts"
    ):
        make_loader(tmp_path)
    assert len(make_loader(tmp_path, parts={"image": "left.jpg"})[0].samples) == 12
