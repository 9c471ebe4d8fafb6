"""Columns: named numpy arrays in one file, memory-mapped on reading. The container of the shard index.

The layout is safetensors' (8 bytes header length, JSON header, raw data), so any safetensors reader opens it and
nothing is ever unpickled. Unlike `safetensors.numpy.save_file` the arrays need not fit in memory: `create` maps the
file for writing and the caller fills the arrays piece by piece.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError

Arrays = dict[str, np.ndarray]

NAME_OF = {
    np.dtype(np.int64): "I64",
    np.dtype(np.uint64): "U64",
    np.dtype(np.int32): "I32",
    np.dtype(np.uint32): "U32",
    np.dtype(np.uint8): "U8",
}
DTYPE_OF: dict[str, Any] = {name: dtype for dtype, name in NAME_OF.items()}
LARGE = 1 << 26  # bytes
MAX_HEADER = 100_000_000  # bytes, the limit of safetensors' own reader


def _header(shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """Header bytes (padded so that the data is aligned to 8 bytes) and number of data bytes."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    # Widest items first: then every array starts at a multiple of its item size, without holes.
    for name in sorted(shapes, key=lambda name: (-shapes[name][0].itemsize, name)):
        dtype, shape = shapes[name]
        stop = start + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        entries[name] = {"dtype": NAME_OF[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, start


@contextmanager
def create(
    path: Path, shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> Iterator[Arrays]:
    """Arrays of the given dtypes and shapes to be filled; the file appears under its name when the block ends well."""
    header, num_bytes = _header(shapes, metadata)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "wb") as file:
            file.write(header)
            file.truncate(len(header) + num_bytes)
        yield load(partial, "r+")[0]
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write whole arrays; the file appears by rename."""
    with create(path, {name: (array.dtype, array.shape) for name, array in arrays.items()}, metadata) as target:
        for name, array in arrays.items():
            target[name][...] = array


def load(path: Path, mode: str = "r") -> tuple[Arrays, dict[str, str]]:
    """Memory-mapped arrays by name, and the metadata.

    Raises:
        UserError: the file is no such container, or is cut short.
    """
    try:
        return _load(path, mode)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and it will be built again") from error


def _map(path: Path, mode: str, offset: int) -> np.ndarray:
    mapped = np.memmap(path, np.uint8, mode, offset=offset)  # type: ignore[call-overload]
    if mode == "r" and len(mapped) > LARGE:
        mapped.base.madvise(mmap.MADV_RANDOM)  # samples are looked up in random order: reading ahead is waste
    return np.asarray(mapped)


def _load(path: Path, mode: str) -> tuple[Arrays, dict[str, str]]:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= MAX_HEADER:
            raise ValueError("no header")
        header = json.loads(file.read(length))
        num_bytes = os.fstat(file.fileno()).st_size - 8 - length
    metadata = {str(key): str(value) for key, value in header.pop("__metadata__", {}).items()}
    data = _map(path, mode, 8 + length) if num_bytes else np.empty(0, np.uint8)
    arrays: Arrays = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        dtype, shape = DTYPE_OF[entry["dtype"]], tuple(entry["shape"])
        if not 0 <= start <= stop <= num_bytes or any(not isinstance(n, int) or n < 0 for n in shape):
            raise ValueError(f"array {name} lies outside the file")
        arrays[name] = data[start:stop].view(dtype).reshape(shape)
    return arrays, metadata
