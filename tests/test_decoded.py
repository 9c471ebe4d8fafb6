"""What was decoded once is read at the next start: the same, of nothing else, and never an obstacle."""

from __future__ import annotations

import errno
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from loader_process import line
from loader_sets import SIZES, make_loader, png, write_set

from pretrain.data import decode, decoded
from pretrain.data.index import ShardIndex
from pretrain.data.keep import Kept
from pretrain.data.shards import ShardReader


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_set(tmp_path / "set")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each image that is decoded."""
    seen: list[int] = []
    original = decode.decode_image

    def counted(content: bytes, *, max_pixels: int) -> np.ndarray:
        seen.append(len(content))
        return original(content, max_pixels=max_pixels)

    monkeypatch.setattr(decode, "decode_image", counted)
    return seen


def keep(shards: Path, *, writes: bool = True, **options: object) -> Kept:
    index_options = {name: options.pop(name) for name in ("parts", "key_pattern") if name in options}
    reader = ShardReader(ShardIndex.open(shards, **index_options))  # type: ignore[arg-type]
    return Kept(reader, writes=writes, **{"only": ("png",), "max_pixels": 10**6, **options})  # type: ignore[arg-type]


def files(shards: Path) -> set[str]:
    return {path.name for path in shards.iterdir() if "decoded" in path.name}


def test_the_second_start_decodes_nothing_and_has_the_same(shards: Path, calls: list[int]) -> None:
    first = keep(shards)
    assert len(calls) == sum(SIZES)
    second = keep(shards)
    assert len(calls) == sum(SIZES)
    assert files(shards) == {"index-decoded-png.safetensors"}
    for sample in range(sum(SIZES)):
        pixels = np.random.default_rng(sample).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        assert np.array_equal(second.read(sample)["png"], pixels)
    assert np.array_equal(first.image_row, second.image_row)
    second.memory[:] = 0  # this process's own, not the file
    assert keep(shards).images().any()


def test_batches_are_the_same_from_the_file(shards: Path) -> None:
    expected = line(make_loader(shards), 1)
    for workers in (0, 0, 2):
        loader = make_loader(shards, keep="memory", workers=workers)
        assert line(loader, 1) == expected
        loader.close()
    assert files(shards)


def test_parts_that_are_no_images_come_back(shards: Path, calls: list[int]) -> None:
    for _ in range(2):
        kept = keep(shards, only=None)
        assert [kept.read(sample)["cls"] for sample in (0, 3)] == [b"0", b"3"]
    assert len(calls) == sum(SIZES)
    assert files(shards) == {"index-decoded-cls-png.safetensors"}


def other_decoder(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.setattr(decoded, "version", lambda name: f"{name} of tomorrow")
    return {}


@pytest.mark.parametrize(
    "change",
    [
        lambda _: {"max_pixels": 10**5},
        lambda _: {"parts": {"png": "png;cls"}},
        lambda _: {"key_pattern": r"(?P<key>[^.]+)\.(?P<part>.+)"},
        other_decoder,
    ],
    ids=["limit", "parts", "pattern", "decoder"],
)
def test_anything_that_could_change_the_pixels_is_decoded_anew(
    shards: Path,
    calls: list[int],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[pytest.MonkeyPatch], dict[str, object]],
) -> None:
    keep(shards)
    changed = change(monkeypatch)
    for _ in range(2):
        keep(shards, **changed)
        assert len(calls) == 2 * sum(SIZES)
    assert files(shards) == {"index-decoded-png.safetensors"}  # in place of the other


def test_shards_written_again_are_decoded_anew(tmp_path: Path, calls: list[int]) -> None:
    keep(write_set(tmp_path / "set"))
    stored = tmp_path / "set" / "index-decoded-png.safetensors"
    keep(write_set(tmp_path / "other", sides=lambda number: 21))
    calls.clear()
    stored.replace(tmp_path / "other" / stored.name)
    assert keep(tmp_path / "other").images().shape[1:] == (21, 21, 3)
    assert len(calls) == sum(SIZES)


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b"",
        lambda b: b[:100],
        lambda b: b[:-9],
        lambda b: b + b"1",
        lambda b: flipped(b, len(b) - 1),
        lambda b: flipped(b, 8 + int.from_bytes(b[:8], "little")),  # the first byte behind the header
        lambda b: b.replace(b'"checksum"', b'"checksun"'),
        lambda b: b.replace(b'"names"', b'"nanes"'),
    ],
    ids=["empty", "header", "cut", "longer", "a bit of the pixels", "a bit of the tables", "no checksum", "no names"],
)
def test_a_damaged_file_is_replaced(shards: Path, calls: list[int], damage: Callable[[bytes], bytes]) -> None:
    keep(shards)
    path = shards / "index-decoded-png.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    for _ in range(2):
        assert keep(shards).images()[7].tobytes() == decode.decode_image(png(7), max_pixels=10**6).tobytes()
    assert len(calls) == 2 * sum(SIZES) + 2


def test_broken_samples_are_looked_at_again(tmp_path: Path) -> None:
    shards = write_set(tmp_path / "set", broken=(4,))
    for _ in range(2):
        assert set(keep(shards).broken) == {4}
    assert not files(shards)


def test_what_need_not_or_cannot_be_written_is_not(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(shards, writes=False)
    with monkeypatch.context() as patch:
        patch.setattr(decoded, "MOST_BYTES", 100)
        keep(shards)
    assert not files(shards)

    def full(path: Path, content: bytes) -> None:
        path.open("wb").close()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert len(keep(shards).images()) == sum(SIZES)
    assert not files(shards)


def test_four_processes_at_once(shards: Path) -> None:
    ShardIndex.open(shards)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=keep, args=(shards,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert files(shards) == {"index-decoded-png.safetensors"}
    assert len(keep(shards).images()) == sum(SIZES)
