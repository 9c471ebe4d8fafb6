"""Shards written and read: by us, by webdataset, by timm; damage after indexing."""

from __future__ import annotations

import os
import pickle
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from test_tar import archive

from pretrain.data.index import ShardIndex
from pretrain.data.shards import DamagedSample, ShardReader, ShardWriter
from pretrain.data.sources.picture import encode_png


def parts_of(shard: int, number: int) -> dict[str, bytes]:
    pixels = np.full((4, 6, 3), 10 * shard + number, np.uint8)
    optional = {"json": b"{}"} if number % 2 else {}
    return {"png": encode_png(pixels), "cls": str(number).encode(), **optional}


def write(folder: Path, shards: int = 3, per_shard: int = 5) -> ShardIndex:
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with ShardWriter(folder / f"{shard:03d}.tar") as writer:
            for number in range(per_shard):
                writer.write(f"s{shard}-{number}", parts_of(shard, number))
    return ShardIndex.open(folder)


def test_every_sample_comes_back_byte_for_byte_also_from_a_pickled_reader_in_threads(tmp_path: Path) -> None:
    reader = pickle.loads(pickle.dumps(ShardReader(write(tmp_path))))
    wrong = []

    def check(first: int) -> None:
        wrong.extend(n for n in range(first, 15, 4) if reader.read(n) != parts_of(n // 5, n % 5))

    threads = [threading.Thread(target=check, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert set(reader.read(0, only=("cls", "absent"))) == {"cls"}
    reader.close()


@pytest.mark.parametrize("form", ["v7", "ustar", "gnu", "oldgnu", "posix"])
def test_tars_of_gnu_tar_in_each_of_its_formats_are_read(tmp_path: Path, form: str) -> None:
    (tmp_path / "1.png").write_bytes(parts_of(0, 2)["png"])
    (tmp_path / "1.cls").write_bytes(b"2\n")
    subprocess.run(["tar", f"--format={form}", "-cf", "a.tar", "1.png", "1.cls"], cwd=tmp_path, check=True)
    index = ShardIndex.open(tmp_path)
    assert index.label(0) == 2
    assert ShardReader(index).read(0) == {**parts_of(0, 2), "cls": b"2\n"}


def test_bytes_depend_on_nothing_but_the_samples(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    assert first.fingerprint == second.fingerprint


def test_few_shards_are_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.data.shards.MAX_OPEN", 2)
    reader = ShardReader(write(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    for number in [*range(15), *range(0, 15, 5)]:
        assert reader.read(number)["cls"] == str(number % 5).encode()
        assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_webdataset_reads_our_shards(tmp_path: Path) -> None:
    index = write(tmp_path)
    dataset = wds.WebDataset([index.url(shard) for shard in range(3)], shardshuffle=False).decode("rgb8")
    samples = list(dataset)
    assert [sample["__key__"] for sample in samples] == index.keys(range(15))
    assert [sample["cls"] for sample in samples] == [n % 5 for n in range(15)]
    assert all((sample["png"] == 10 * (n // 5) + n % 5).all() for n, sample in enumerate(samples))


def test_webdataset_reads_them_by_brace_pattern_and_batches(tmp_path: Path) -> None:
    write(tmp_path)
    pattern = f"{tmp_path}/{{000..002}}.tar"
    loader = wds.WebDataset(pattern, shardshuffle=False).decode("torchrgb").to_tuple("png", "cls").batched(5)
    shapes = [tuple(images.shape) for images, _ in loader]
    assert shapes == [(5, 3, 4, 6)] * 3


def test_a_failed_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bytes"), ShardWriter(tmp_path / "a.tar") as writer:
        writer.write("k", {"png": 5})  # type: ignore[dict-item]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("damage", ["cut", "missing", "replaced"])
def test_shards_that_change_while_in_use_give_damaged_samples(tmp_path: Path, damage: str) -> None:
    index = write(tmp_path)
    path = tmp_path / "001.tar"
    if damage == "cut":
        os.truncate(path, 3 * 512)
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(archive([(f"other{n}.png", b"z" * 700) for n in range(20)])[: path.stat().st_size])
    reader = ShardReader(index)
    assert reader.read(4)["cls"] == b"4"
    with pytest.raises(DamagedSample) as caught:
        reader.read(8)
    assert caught.value.shard == "001.tar"
    assert caught.value.key == "s1-3"
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.shard, again.key, again.reason) == (caught.value.shard, caught.value.key, caught.value.reason)


def test_a_descriptor_that_its_file_server_has_forgotten_is_opened_anew(tmp_path: Path) -> None:
    reader = ShardReader(write(tmp_path))
    reader.read(0)
    (descriptor,) = reader._open.values()
    useless = os.open(tmp_path / "000.tar", os.O_WRONLY)  # reading it fails, each time
    os.dup2(useless, descriptor)
    os.close(useless)
    assert [reader.read(n)["cls"] for n in (1, 2)] == [b"1", b"2"]


def test_remote_shards_need_a_staging_folder(tmp_path: Path) -> None:
    write(tmp_path)
    index = ShardIndex.open(f"pipe:cat {tmp_path}/{{000..002}}.tar", cache_dir=tmp_path / "cache")
    assert len(index) == 15
    with pytest.raises(ValueError, match=r"set loading\.cache_dir"):
        ShardReader(index)
