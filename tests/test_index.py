"""The index: lookup, mapping of parts, several layouts of locations, irregular and huge sets."""

from __future__ import annotations

import json
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from test_tar import archive

from configs.errors import UserError
from pretrain.data import columns
from pretrain.data.index import FORMAT, ShardIndex, class_sorted_share
from pretrain.data.indexing import combine, save_scan
from pretrain.data.location import Location, is_remote
from pretrain.data.scan import DEFAULT_KEY, NO_LABEL, ShardScan


def write_set(folder: Path, sizes: list[int], *, ext: str = "jpg") -> None:
    """Foreign tars `{number}.tar` with samples `{shard}-{i}` whose image says so and whose label is i."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, size in enumerate(sizes):
        files = [
            file
            for i in range(size)
            for file in ((f"{shard}-{i}.{ext}", f"{shard}/{i}".encode()), (f"{shard}-{i}.cls", str(i).encode()))
        ]
        (folder / f"{shard:03d}.tar").write_bytes(archive(files))


def test_lookup_across_shards_of_different_sizes_and_an_empty_one(tmp_path: Path) -> None:
    write_set(tmp_path, [3, 0, 1, 4])
    index = ShardIndex.open(tmp_path)
    assert len(index) == 8
    assert index.shard_sizes.tolist() == [3, 0, 1, 4]
    assert index.shard_of(np.arange(8)).tolist() == [0, 0, 0, 2, 3, 3, 3, 3]
    assert index.keys(range(8)) == ["0-0", "0-1", "0-2", "2-0", "3-0", "3-1", "3-2", "3-3"]
    assert [index.label(sample) for sample in range(8)] == [0, 1, 2, 0, 0, 1, 2, 3]
    assert index.notes == ["001.tar: no samples"]
    for sample in range(8):
        shard, offset, size = index.parts(sample)["jpg"]
        content = Path(index.url(shard)).read_bytes()[offset : offset + size]
        assert content.decode() == index.keys([sample])[0].replace("-", "/")
    with pytest.raises(IndexError):
        index.keys([8])


def test_is_built_once_and_shared_by_pickle(tmp_path: Path) -> None:
    write_set(tmp_path, [2, 2])
    first = ShardIndex.open(tmp_path)
    stamp = first.path.stat().st_mtime_ns
    again = pickle.loads(pickle.dumps(ShardIndex.open(tmp_path)))
    assert again.path.stat().st_mtime_ns == stamp
    assert again.fingerprint == first.fingerprint
    assert again.keys([3]) == ["1-1"]
    assert json.loads((tmp_path / "index.json").read_text())["samples"] == 4
    assert sorted(os.listdir(tmp_path)) == ["000.tar", "001.tar", "index.json", "index.safetensors"]


def test_patterns_lists_and_folders_that_cannot_be_written(tmp_path: Path) -> None:
    write_set(tmp_path / "a", [1, 2])
    write_set(tmp_path / "b", [3])
    pattern = ShardIndex.open(f"{tmp_path}/a/{{000..001}}.tar", cache_dir=tmp_path / "cache")
    assert len(pattern) == 3
    both = ShardIndex.open([f"{tmp_path}/b/000.tar", f"{tmp_path}/a/001.tar"], cache_dir=tmp_path / "cache")
    assert both.keys(range(5)) == ["0-0", "0-1", "0-2", "1-0", "1-1"]
    assert both.shard_name(1) == "a/001.tar"
    assert not is_remote("/a/b.tar")
    assert is_remote("pipe:cat x.tar")
    assert is_remote("https://host/x.tar")


def test_parts_are_mapped_by_preference(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(archive([("a.jpeg", b"1"), ("a.label", b"3"), ("b.png", b"2"), ("b.jpeg", b"4")]))
    index = ShardIndex.open(tmp_path, parts={"image": "png;jpeg", "cls": ["label"]})
    assert index.part_names == ["image", "cls"]
    assert set(index.parts(0)) == {"image", "cls"}
    assert index.parts(1)["image"][2] == 1
    assert Path(index.url(0)).read_bytes()[index.parts(1)["image"][1] :][:1] == b"2"
    assert index.label(0) == 3
    with pytest.raises(UserError, match=r"^data.parts: no webp in these shards; they have"):
        ShardIndex.open(tmp_path, parts={"image": "webp"})


def test_missing_added_and_changed_shards_are_named(tmp_path: Path) -> None:
    write_set(tmp_path, [2, 2])
    ShardIndex.open(tmp_path)
    (tmp_path / "000.tar").write_bytes((tmp_path / "000.tar").read_bytes()[:-512])
    with pytest.raises(UserError, match=r"000.tar has \d+ bytes, its index says"):
        ShardIndex.open(tmp_path)
    os.rename(tmp_path / "000.tar", tmp_path / "007.tar")
    with pytest.raises(UserError, match=r"000.tar is missing"):
        ShardIndex.open(tmp_path)
    write_set(tmp_path, [2, 2])
    with pytest.raises(UserError, match=r"007.tar was added"):
        ShardIndex.open(tmp_path)


def test_finding_a_set_looks_at_folders_and_not_at_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path, [2, 2])
    looked: list[str] = []
    monkeypatch.setattr(os.path, "isfile", lambda path: looked.append(str(path)))
    assert len(Location.find(f"{tmp_path}/{{000..001}}.tar")) == 2
    assert not looked
    with pytest.raises(UserError, match=r"no shards at .*/002\.tar"):
        Location.find(f"{tmp_path}/{{000..003}}.tar")
    assert looked == [f"{tmp_path}/002.tar"]


def test_nothing_there_is_a_user_error(tmp_path: Path) -> None:
    for where in (tmp_path, tmp_path / "no", f"{tmp_path}/{{0..3}}.tar", [f"{tmp_path}/x.tar"]):
        with pytest.raises(UserError, match=r"no \*.tar in|no shards at"):
            ShardIndex.open(where)
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=r"did you mean .*/train\?"):
        ShardIndex.open(tmp_path)
    (tmp_path / "x.tar").write_bytes(b"garbage" * 500)
    with pytest.raises(UserError, match=r"no samples in 1 shards, the first being x.tar"):
        ShardIndex.open(tmp_path)
    with pytest.raises(UserError, match="listed twice"):
        Location.find([f"{tmp_path}/x.tar", f"{tmp_path}/x.tar"])


def test_keys_repeated_in_another_shard_are_reported(tmp_path: Path) -> None:
    for name in ("0", "1"):
        (tmp_path / f"{name}.tar").write_bytes(archive([("same.jpg", b"1"), (f"own{name}.jpg", b"2")]))
    index = ShardIndex.open(tmp_path)
    assert index.notes == ["1 keys occur again in another shard"]
    assert "1 irregularities" in index.warnings()[0]


def test_sorted_classes_are_warned_about() -> None:
    labels = np.repeat(np.arange(10, dtype=np.int32), 100)
    first = np.array([0, 500, 1000])
    share = class_sorted_share(labels, first)
    assert share is not None
    assert share > 0.98
    assert class_sorted_share(np.random.default_rng(0).permutation(labels), first) is None
    assert class_sorted_share(np.zeros(1000, np.int32), first) is None
    assert class_sorted_share(np.full(1000, NO_LABEL, np.int32), first) is None


def _scan(name: str, count: int) -> ShardScan:
    column = np.arange(1, count + 1, dtype=np.uint32)[:, None]
    keys = [f"{name}{i}" for i in range(count)]
    return ShardScan(name, 512 * count, bytes(32), ["jpg"], keys, column, column, np.zeros(count, np.int32))


def test_combining_equals_concatenation(tmp_path: Path) -> None:
    paths = []
    for shard, count in enumerate([3, 0, 5]):
        save_scan(_scan(f"s{shard}", count), tmp_path / f"{shard}.scan", key_pattern=DEFAULT_KEY)
        paths.append(tmp_path / f"{shard}.scan")
    combine(paths, tmp_path / "index.safetensors", key_pattern=DEFAULT_KEY)
    arrays, metadata = columns.load(tmp_path / "index.safetensors")
    assert metadata["format"] == FORMAT
    assert arrays["shard_first"].tolist() == [0, 3, 3, 8]
    assert arrays["offset"][:, 0].tolist() == [1, 2, 3, 1, 2, 3, 4, 5]
    assert bytes(arrays["keys"]) == b"".join(f"s{s}{i}".encode() for s, n in ((0, 3), (2, 5)) for i in range(n))


def _own_megabytes() -> float:
    """Memory of this process that is not mapped from files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def test_a_thousand_million_samples_cost_little_memory(tmp_path: Path) -> None:
    """1.3e9 samples in 130,000 shards, as a sparse file: what is looked up is mapped, nothing else."""
    S, per_shard = 130_000, 10_000
    N = S * per_shard
    shapes = {
        "shard_name": (np.dtype(np.uint8), (S, 10)),
        "shard_bytes": (np.dtype(np.int64), (S,)),
        "shard_sha256": (np.dtype(np.uint8), (S, 32)),
        "shard_first": (np.dtype(np.int64), (S + 1,)),
        "key_first": (np.dtype(np.int64), (S + 1,)),
        "offset": (np.dtype(np.uint32), (N, 1)),
        "size": (np.dtype(np.uint32), (N, 1)),
        "label": (np.dtype(np.int32), (N,)),
        "key_end": (np.dtype(np.uint32), (N,)),
        "keys": (np.dtype(np.uint8), (N * 9,)),
    }
    metadata = {"format": FORMAT, "parts": '["jpg"]', "fingerprint": "0", "notes": "[]", "num_notes": "0"}
    try:
        with columns.create(tmp_path / "huge", shapes, metadata) as arrays:
            arrays["shard_first"][:] = np.arange(S + 1) * per_shard
            arrays["key_first"][:] = np.arange(S + 1) * per_shard * 9
    except OSError:
        pytest.skip("no sparse files here")
    names = "\n".join(f"{shard:06d}.tar" for shard in range(S))
    before = _own_megabytes()
    index = ShardIndex(tmp_path / "huge", Location("https://host/", names))
    samples = np.random.default_rng(0).integers(0, len(index), 256)
    for _ in range(2):  # the second time without waiting for the disk
        start = time.perf_counter()
        shards = index.shard_of(samples)
        index.keys(samples)
        found = [index.parts(sample) for sample in samples.tolist()]
        seconds = time.perf_counter() - start
    assert len(found) == 256
    np.testing.assert_array_equal(shards, samples // per_shard)
    assert seconds < 0.25, "milliseconds, on an idle machine"
    assert _own_megabytes() - before < 30


def test_opening_a_set_twice_at_once_builds_one_index(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    write_set(tmp_path, [20] * 6)
    with ThreadPoolExecutor(4) as pool:
        prints = {index.fingerprint for index in pool.map(lambda _: ShardIndex.open(tmp_path), range(4))}
    assert len(prints) == 1
    start = time.perf_counter()
    ShardIndex.open(tmp_path)
    assert time.perf_counter() - start < 1.0
