"""TFRecord: records of tf.train.Example read without TensorFlow, from files plain or gzipped.

A record is length (8 bytes), checksum of the length (4), data, checksum of the data (4). The length's checksum is
verified, so that garbage is told from records; gzip has its own checksum for the data. An Example is a protocol buffer:
features (1) -> map entries (1) of name (1) and Feature (2), which holds bytes (1), floats (2) or integers (3).
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

MAX_RECORD = 1 << 28  # bytes
Value = np.ndarray | list[bytes]


class RecordError(ValueError):
    """The file holds no such record."""


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


CRC_TABLE = _crc_table()


def masked_crc32c(data: bytes) -> int:
    """TFRecord's checksum: CRC-32C, rotated and offset. Slow: for a few bytes."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC_TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def records(path: Path) -> Iterator[bytes]:
    """Data of the records in order.

    Raises:
        RecordError: garbage, or the file is cut off.
    """
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    with (gzip.open if zipped else open)(path, "rb") as stream:
        try:
            yield from _records(cast(BinaryIO, stream))
        except (EOFError, OSError, zlib.error) as error:
            raise RecordError(f"{path}: {error}") from error


def _records(stream: BinaryIO) -> Iterator[bytes]:
    number = 0
    while head := stream.read(12):
        length = int.from_bytes(head[:8], "little")
        if len(head) < 12 or masked_crc32c(head[:8]) != int.from_bytes(head[8:], "little") or length > MAX_RECORD:
            raise RecordError(f"record {number} has no valid head")
        data = stream.read(length)
        if len(data) < length or len(stream.read(4)) < 4:
            raise RecordError(f"record {number} is cut off")
        yield data
        number += 1


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise RecordError("a number is cut off")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """(number, content) of the fields of a message; content is bytes or, for varints, the number."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise RecordError(f"field of unknown kind {kind}")
        if at + size > len(data):
            raise RecordError("a field is cut off")
        yield tag >> 3, data[at : at + size]
        at += size


def _bytes(field: memoryview | int | None) -> memoryview:
    if not isinstance(field, memoryview):
        raise RecordError("a message is missing or has the wrong kind")
    return field


def example(data: bytes) -> dict[str, Value]:
    """Features by name: lists of byte strings, float32 or int64 arrays.

    Strings of one byte each (as the multi-object datasets store pictures) come as one uint8 array.

    Raises:
        RecordError: not a tf.train.Example.
    """
    features: dict[str, Value] = {}
    for number, message in _fields(memoryview(data)):
        if number != 1:
            continue
        for _, entry in _fields(_bytes(message)):
            parts = dict(_fields(_bytes(entry)))
            name = bytes(_bytes(parts.get(1))).decode("utf-8", "replace")
            for kind, values in _fields(_bytes(parts.get(2))):
                features[name] = _values(kind, _bytes(values))
    return features


def _values(kind: int, data: memoryview) -> Value:
    if kind == 1:
        triples = np.frombuffer(data, np.uint8)
        if len(triples) and len(triples) % 3 == 0:
            triples = triples.reshape(-1, 3)
            if (triples[:, 0] == 0x0A).all() and (triples[:, 1] == 1).all():
                return triples[:, 2]
        return [bytes(_bytes(value)) for _, value in _fields(data)]
    if kind == 2:
        packed = b"".join(bytes(_bytes(value)) for _, value in _fields(data))
        if len(packed) % 4:
            raise RecordError("floats are cut off")
        return np.frombuffer(packed, np.float32)
    if kind == 3:
        return np.array(list(_integers(data)), np.uint64).astype(np.int64)
    raise RecordError(f"feature of unknown kind {kind}")


def _integers(data: memoryview) -> Iterator[int]:
    for _, value in _fields(data):
        if isinstance(value, int):
            yield value
            continue
        at = 0
        while at < len(value):
            number, at = _varint(value, at)
            yield number & (2**64 - 1)
