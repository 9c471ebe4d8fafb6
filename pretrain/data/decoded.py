"""A set as it was decoded once, in a file beside its index: the next start reads it instead of decoding it again.

Owns: the file, and what it must have been made of to be used. It is a help and no more: one that is damaged or made of
something else is ignored and replaced, one that cannot be written is done without, and anyone may delete it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from pretrain.data.index import ShardIndex

FORMAT = "decoded-1"  # another one when the same file would be decoded to other pixels
DECODERS = ("pillow", "simplejpeg")
ARRAYS = ("table", "first", "memory")  # of Decoded
MOST_BYTES = 1 << 30  # a larger set is not worth a second copy of it on the disk


@dataclass(frozen=True)
class Decoded:
    """The parts of all samples, images as pixels.

    Attributes:
        names: of parts.
        table: int64 [parts of all samples, 5]: number of its name, offset and size in `memory`, and of an image height
            and width (0, 0: bytes).
        first: int64 [N + 1], the row of each sample's first part.
        memory: uint8, all that the table points to.
    """

    names: list[str]
    table: np.ndarray
    first: np.ndarray
    memory: np.ndarray


def path_of(index: ShardIndex, only: Sequence[str] | None) -> Path:
    """Where these parts (None: all) of a set are, once they have been decoded."""
    parts = [name for name in index.part_names if only is None or name in only]
    return index.path.with_name(f"{index.path.stem}-decoded-{'-'.join(parts)}.safetensors")


def key_of(index: ShardIndex, only: Sequence[str] | None, max_pixels: int) -> str:
    """A hash of all that decides on what is decoded: the index, the parts that are read, the decoders."""
    settings = [FORMAT, index.sources, only, max_pixels, [version(name) for name in DECODERS]]
    return hashlib.sha256(index.path.read_bytes() + json.dumps(settings).encode()).hexdigest()


def load(path: Path, key: str) -> Decoded | None:
    """What lies there, if it is whole and of this key."""
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != key:
                return None
            decoded = Decoded(json.loads(metadata["names"]), *(file.get_tensor(name) for name in ARRAYS))
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return decoded if metadata.get("checksum") == _checksum(decoded) else None


def store(path: Path, key: str, decoded: Decoded) -> None:
    """Write for the next start; does nothing for a large set, in a folder that is read-only, or on a full disk."""
    if decoded.memory.nbytes > MOST_BYTES:
        return
    arrays = {name: getattr(decoded, name) for name in ARRAYS}
    metadata = {"key": key, "names": json.dumps(decoded.names), "checksum": _checksum(decoded)}
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    with contextlib.suppress(OSError):
        partial.write_bytes(save(arrays, metadata))
        os.replace(partial, path)
    with contextlib.suppress(OSError):
        partial.unlink(missing_ok=True)


def _checksum(decoded: Decoded) -> str:
    checksum = 0
    for name in ARRAYS:
        checksum = zlib.crc32(np.ascontiguousarray(getattr(decoded, name)).data, checksum)
    return f"{checksum:08x}"
