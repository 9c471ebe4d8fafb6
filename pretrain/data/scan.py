"""Scan: one shard's part of the index, found in one pass over the tar. The same for our shards and for foreign ones.

A sample is a run of files with the same key, as webdataset reads them: the key is the name up to the first dot of the
base name, the part is the rest in lower case. Whatever is wrong goes into the shard's ledger, never up as an error.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from pretrain.data.tar import BLOCK, CHUNK, Member, Stream, TarDamagedError, members

NO_LABEL = np.iinfo(np.int32).min
LABEL_PARTS = ("cls", "cls.txt", "class", "label", "label.txt")
MAX_PARTS = 64  # distinct parts in one set
MAX_PART_BYTES = 2**32 - 1
MAX_NOTES = 100  # lines kept for each shard; the rest is counted
DEFAULT_KEY = r"(?P<key>(?:.*/)?[^/.]+)\.(?P<part>[^/]+)"
HIDDEN = re.compile(r"__[^/]*__(/|$)")  # webdataset's own metadata entries


@dataclass
class ShardScan:
    """What a shard holds. Arrays have one row for each sample; columns of `offset` and `size` are `parts`.

    Attributes:
        offset: position of the data in blocks of 512 bytes, 0 where the sample lacks the part. uint32 [n, parts]
        size: bytes. uint32 [n, parts]
        label: int32 [n], NO_LABEL where there is none.
        notes: what was wrong, one line each, at most MAX_NOTES; `num_notes` counts all.
    """

    name: str
    num_bytes: int
    sha256: bytes
    parts: list[str]
    keys: list[str]
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    notes: list[str] = field(default_factory=list)
    num_notes: int = 0

    @property
    def key_hash(self) -> np.ndarray:
        """64 bits of each key, to find keys that occur twice in a set. uint64 [n]"""
        digests = [hashlib.blake2b(key.encode(), digest_size=8).digest() for key in self.keys]
        return np.frombuffer(b"".join(digests), np.uint64)


class _Collector:
    """Groups members into samples."""

    def __init__(self, key_pattern: str) -> None:
        self.pattern = re.compile(key_pattern)
        self.parts: dict[str, int] = {}
        self.keys: list[str] = []
        self.rows: list[dict[int, tuple[int, int]]] = []
        self.labels: list[int] = []
        self.seen: set[str] = set()
        self.notes: list[str] = []
        self.num_notes = 0

    def note(self, text: str) -> None:
        self.num_notes += 1
        if len(self.notes) < MAX_NOTES:
            self.notes.append(text)

    def add(self, name: str, offset: int, size: int) -> str | None:
        """Book a member; returns its part, or None where it belongs to no sample."""
        if HIDDEN.match(name):
            return None
        match = self.pattern.fullmatch(name)
        if match is None:
            self.note(f"{name[:80]!r}: no key and extension, ignored")
            return None
        key, part = match["key"], match["part"].lower()
        if size > MAX_PART_BYTES or offset % BLOCK or offset // BLOCK > MAX_PART_BYTES:
            self.note(f"{name[:80]!r}: {size} bytes at {offset} are beyond the index, ignored")
            return None
        if part not in self.parts and len(self.parts) == MAX_PARTS:
            self.note(f"{name[:80]!r}: more than {MAX_PARTS} kinds of parts, ignored")
            return None
        column = self.parts.setdefault(part, len(self.parts))
        if not self.keys or self.keys[-1] != key or column in self.rows[-1]:
            if key in self.seen:
                self.note(f"key {key[:80]!r} occurs again")
            self.seen.add(key)
            self.keys.append(key)
            self.rows.append({})
            self.labels.append(NO_LABEL)
        self.rows[-1][column] = (offset // BLOCK, size)
        return part

    def label(self, data: bytes) -> None:
        if re.fullmatch(rb"\s*[+-]?[0-9]{1,10}\s*", data) and abs(value := int(data)) < 2**31:
            self.labels[-1] = value
        else:
            self.note(f"key {self.keys[-1][:80]!r}: label {data[:20]!r} is no integer, ignored")

    def drop(self, cut: Member) -> None:
        """Take out the member that the file ends inside; the rest of its sample may still be of use."""
        if not self.rows:
            return
        columns = self.rows[-1]
        for column in [column for column, (at, _) in columns.items() if at * BLOCK == cut.offset]:
            del columns[column]
        if not columns:
            del self.rows[-1], self.labels[-1], self.keys[-1]


def _goes_on(stream: Stream) -> bool:
    """Whether there is anything but zeros ahead, as far as the first that is found."""
    while content := stream.read(CHUNK):
        if content.strip(b"\0"):
            return True
    return False


def scan(file: BinaryIO, name: str, *, key_pattern: str = DEFAULT_KEY) -> ShardScan:
    """Read a tar from its beginning to its end. Never raises on what the tar holds; reading errors of `file` pass up.

    Args:
        key_pattern: regular expression with the groups `key` and `part` that matches a whole member name.
    """
    stream, book = Stream(file), _Collector(key_pattern)
    try:
        for member in members(stream, book.note):
            if book.add(*member) in LABEL_PARTS:
                book.label(stream.read(min(member.size, 32)))
        end = stream.position
        if _goes_on(stream):
            book.note(f"what follows the end mark at byte {end} is ignored (tars put together with cat?)")
    except TarDamagedError as error:
        book.note(str(error))
        if error.cut is not None:
            book.drop(error.cut)
    num_bytes, sha256 = stream.finish()
    if not book.keys:
        book.note("no samples")
    offset = np.zeros((len(book.keys), len(book.parts)), np.uint32)
    size = np.zeros_like(offset)
    for row, columns in enumerate(book.rows):
        for column, (at, length) in columns.items():
            offset[row, column], size[row, column] = at, length
    label = np.array(book.labels, np.int32)
    return ShardScan(
        name, num_bytes, sha256, list(book.parts), book.keys, offset, size, label, book.notes, book.num_notes
    )
