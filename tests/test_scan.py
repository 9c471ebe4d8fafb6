"""Scanning a shard: what a foreign tar may hold, and that its ledger says so."""

from __future__ import annotations

import io

import numpy as np
import webdataset as wds
from test_tar import archive

from pretrain.data.scan import MAX_NOTES, NO_LABEL, scan


def test_keys_and_parts_are_those_of_webdataset(tmp_path) -> None:
    files = [("a/1.jpg", b"1"), ("a/1.cls", b"7"), ("a/2.seg.PNG", b"2"), ("b.c/3.x.y", b"3"), ("b.c/3.z", b"4")]
    (tmp_path / "s.tar").write_bytes(archive(files))
    ours = scan(io.BytesIO(archive(files)), "s.tar")
    theirs = list(wds.WebDataset(str(tmp_path / "s.tar"), shardshuffle=False))
    assert ours.keys == [sample["__key__"] for sample in theirs]
    for row, sample in enumerate(theirs):
        present = {part for part, offset in zip(ours.parts, ours.offset[row]) if offset}
        assert present == {name for name in sample if not name.startswith("__")}


def test_labels_and_offsets() -> None:
    content = archive([("1.cls", b" 12\n"), ("1.jpg", b"abc"), ("2.jpg", b"defg"), ("3.cls", b"cat"), ("3.jpg", b"")])
    found = scan(io.BytesIO(content), "s")
    assert found.label.tolist() == [12, NO_LABEL, NO_LABEL]
    assert [note for note in found.notes if "no integer" in note] == found.notes
    jpg = found.parts.index("jpg")
    pieces = [
        content[o * 512 : o * 512 + s] for o, s in zip(found.offset[:, jpg].tolist(), found.size[:, jpg].tolist())
    ]
    assert pieces == [b"abc", b"defg", b""]


def test_repeated_keys_are_kept_and_reported() -> None:
    found = scan(io.BytesIO(archive([("a.jpg", b"1"), ("a.jpg", b"2"), ("b.jpg", b"3"), ("a.png", b"4")])), "s")
    assert found.keys == ["a", "a", "b", "a"]
    assert sum("occurs again" in note for note in found.notes) == 2
    assert len(np.unique(found.key_hash)) == 2


def test_a_cut_shard_keeps_what_is_whole() -> None:
    content = archive([("1.cls", b"3"), ("1.jpg", b"x" * 2000), ("2.cls", b"4"), ("2.jpg", b"y" * 2000)])
    found = scan(io.BytesIO(content[: 512 * 11]), "s")
    assert found.keys == ["1", "2"]
    assert not found.offset[1, found.parts.index("jpg")]
    assert "ends inside '2.jpg'" in found.notes[0]
    assert found.num_bytes == 512 * 11


def test_a_shard_cut_between_two_files_is_noticed() -> None:
    content = archive([("1.jpg", b"x" * 2000), ("2.jpg", b"y")])
    found = scan(io.BytesIO(content[: 512 * 5]), "s")
    assert found.keys == ["1"]
    assert "no end mark after 2560 bytes" in found.notes[0]


def test_tars_put_one_behind_another_are_told() -> None:
    """Like webdataset and tar itself, only the first is read; but the rest is not lost in silence."""
    first, second = archive([("1.jpg", b"x")]), archive([("2.jpg", b"y")])
    found = scan(io.BytesIO(first + second), "s")
    assert found.keys == ["1"]
    assert found.notes == ["what follows the end mark at byte 1536 is ignored (tars put together with cat?)"]
    assert found.num_bytes == len(first + second)
    assert not scan(io.BytesIO(first + bytes(5 << 20)), "s").notes


def test_empty_and_garbage_shards_have_a_note() -> None:
    for content in (b"", archive([]), b"no tar at all" * 100):
        found = scan(io.BytesIO(content), "s")
        assert not found.keys
        assert found.notes[-1] == "no samples"


def test_another_layout_of_names() -> None:
    content = archive([("img.v2.0001.jpeg", b"1"), ("img.v2.0001.label", b"5"), ("img.v2.0002.jpeg", b"2")])
    found = scan(io.BytesIO(content), "s", key_pattern=r"(?P<key>.+)\.(?P<part>[^.]+)")
    assert found.keys == ["img.v2.0001", "img.v2.0002"]
    assert found.label.tolist() == [5, NO_LABEL]


def test_notes_are_counted_beyond_those_kept() -> None:
    found = scan(io.BytesIO(archive([("a.jpg", b"1")] * (MAX_NOTES + 50))), "s")
    assert len(found.notes) == MAX_NOTES
    assert found.num_notes == MAX_NOTES + 49
