"""The tar reader against Python's tarfile, and on archives that are cut, hostile or garbage."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import tarfile
from collections.abc import Sequence
from types import ModuleType

import pytest

from pretrain.data.tar import Stream, TarDamagedError, members, unsafe


def archive(
    files: Sequence[tuple[str, bytes]], *, form: int = tarfile.USTAR_FORMAT, extra: Sequence[str] = ()
) -> bytes:
    """A tar of files, and of one member for each type in `extra`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for kind in extra:
            info = tarfile.TarInfo(f"special{kind}")
            info.type, info.linkname = kind.encode(), "/etc/passwd"
            tar.addfile(info)
    return buffer.getvalue()


def listed(content: bytes, *, digest: bool = True) -> tuple[list[tuple[str, int, int]], list[str]]:
    notes: list[str] = []
    return [tuple(member) for member in members(Stream(io.BytesIO(content), digest=digest), notes.append)], notes


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("digest", [True, False])
def test_members_equal_those_of_tarfile(form: int, digest: bool) -> None:
    draw = random.Random(form)
    long = [5, 90] if form == tarfile.USTAR_FORMAT else [5, 90, 150, 300]
    files = [
        (f"d{i % 7}/{'x' * draw.choice(long)}{i}.jpg", draw.randbytes(draw.choice([0, 1, 511, 512, 513, 5000])))
        for i in range(200)
    ]
    content = archive([*files, ("big.bin", bytes(3_000_000)), ("last.jpg", b"end")], form=form)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar if info.isreg()]
    assert listed(content, digest=digest)[0] == expected


def test_position_and_checksum_cover_the_whole_file() -> None:
    import hashlib

    content = archive([("a.jpg", b"x" * 700)]) + b"trailing bytes"
    stream = Stream(io.BytesIO(content))
    assert len(list(members(stream, lambda line: None))) == 1
    assert stream.finish() == (len(content), hashlib.sha256(content).digest())


def test_links_devices_and_names_outside_are_reported_and_passed_over() -> None:
    content = archive([("../up.jpg", b"1"), ("/root.jpg", b"2"), ("ok.jpg", b"3")], extra=["1", "2", "3", "4", "6"])
    found, notes = listed(content)
    assert [name for name, _, _ in found] == ["ok.jpg"]
    assert len(notes) == 7
    assert sum("outside" in note for note in notes) == 2


@pytest.mark.parametrize(("packer", "compress"), [("gzip", gzip), ("bzip2", bz2), ("xz", lzma)])
@pytest.mark.parametrize("size", [10, 100_000])
def test_a_compressed_tar_is_called_so(packer: str, compress: ModuleType, size: int) -> None:
    content = archive([("a.jpg", random.Random(0).randbytes(size))])
    with pytest.raises(TarDamagedError, match=f"compressed by {packer}, .* {packer} -d <"):
        listed(compress.compress(content))


def test_a_name_may_begin_as_a_compressed_file_does() -> None:
    assert listed(archive([("BZh.jpg", b"1")]))[0] == [("BZh.jpg", 512, 1)]


@pytest.mark.parametrize(
    ("name", "outside"),
    [
        ("a/b.jpg", False),
        ("/a", True),
        ("../a", True),
        ("a/../../b", True),
        ("C:/a", True),
        ("..\\a", True),
        ("", True),
    ],
)
def test_unsafe_names(name: str, outside: bool) -> None:
    assert unsafe(name) is outside


def test_a_cut_archive_names_the_member_it_ends_inside() -> None:
    content = archive([("a.jpg", b"x" * 600), ("b.jpg", b"y" * 3000)])
    with pytest.raises(TarDamagedError, match=r"ends inside 'b.jpg', 2000 bytes missing") as caught:
        listed(content[: 512 + 1024 + 512 + 1000])
    assert caught.value.cut is not None
    assert caught.value.cut.name == "b.jpg"


@pytest.mark.parametrize("content", [b"", b"garbage", bytes(range(256)) * 8, b"\xff" * 512])
def test_garbage_is_told(content: bytes) -> None:
    with pytest.raises(TarDamagedError):
        listed(content)
