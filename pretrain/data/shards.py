"""Shards: tars written with webdataset's own writer, and samples read back by offset.

A part and its tar header (which tells whether the shard still is the one indexed) are read with a pread each: nothing
is copied twice, and no position is shared, so that threads and forked processes may use one reader.
"""

from __future__ import annotations

import os
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from pretrain.data.index import ShardIndex
from pretrain.data.location import is_remote
from pretrain.data.staging import ShardChangedError, Staging
from pretrain.data.tar import BLOCK, is_header

MAX_OPEN = 128  # shards kept open by a reader


class DamagedSample(Exception):  # noqa: N818 (what the ledger lists, by its name)
    """A sample that cannot be read or decoded: shard, key and reason, as they go into the ledger."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(f"{shard}: {key}: {reason}")
        self.shard, self.key, self.reason = shard, key, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.shard, self.key, self.reason)


class ShardReader:
    """Reads samples of an index. Cheap to make; picklable (files are opened again where it arrives)."""

    def __init__(self, index: ShardIndex, cache: Staging | None = None) -> None:
        """
        Args:
            cache: where remote shards are staged; local ones are read where they lie.

        Raises:
            ValueError: remote shards and no cache.
        """
        self.index, self.cache = index, cache
        self._open: OrderedDict[int, int] = OrderedDict()  # shard -> file descriptor, least recently used first
        self._lock = Lock()
        weakref.finalize(self, _close, self._open)
        if cache is None and is_remote(index.url(0)):
            raise ValueError(f"remote shards ({index.url(0)}) need a staging folder: set loading.cache_dir")

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardReader, (self.index, self.cache)

    def read(self, sample: int, *, only: Iterable[str] | None = None) -> dict[str, bytes]:
        """Parts of a sample by name.

        Args:
            only: names of the parts wanted; None: all.

        Raises:
            DamagedSample: the shard is missing, cut short or changed since it was indexed.
            StagingError: a remote shard could not be fetched.
        """
        wanted = None if only is None else set(only)
        parts = {name: at for name, at in self.index.parts(sample).items() if wanted is None or name in wanted}
        try:
            return {name: self._part(*at) for name, at in parts.items()}
        except (OSError, ShardChangedError) as error:
            shard = int(self.index.shard_of(np.asarray(sample)))
            reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            raise DamagedSample(self.index.shard_name(shard), self.index.keys([sample])[0], reason) from error

    def prefetch(self, shards: Iterable[int]) -> None:
        """Begin to stage remote shards in the background; nothing to do for local ones."""
        for shard in shards:
            if self.cache is not None and is_remote(self.index.url(shard)):
                self.cache.prefetch(self.index.url(shard), **self._identity(shard))

    def close(self) -> None:
        """Close the shards held open."""
        with self._lock:
            _close(self._open)

    def _identity(self, shard: int) -> dict[str, Any]:
        return {"num_bytes": int(self.index.shard_bytes[shard]), "sha256": bytes(self.index.shard_sha256[shard])}

    def _part(self, shard: int, offset: int, size: int) -> bytes:
        with self._lock:
            try:
                header, data = self._pread(shard, offset, size)
            except OSError:  # a file server that was away may know nothing of what was open (ESTALE, ESHUTDOWN)
                self._forget(shard)
                header, data = self._pread(shard, offset, size)
        if len(header) + len(data) < BLOCK + size:
            raise ShardChangedError("the shard is shorter than when it was indexed")
        if not is_header(header) or not _same_size(header[124:136], size):
            raise ShardChangedError("the shard is not the one that was indexed (no such file at this place)")
        return data

    def _pread(self, shard: int, offset: int, size: int) -> tuple[bytes, bytes]:
        descriptor = self._descriptor(shard)
        return os.pread(descriptor, BLOCK, offset - BLOCK), os.pread(descriptor, size, offset)

    def _forget(self, shard: int) -> None:
        if shard in self._open:
            with suppress(OSError):
                os.close(self._open.pop(shard))

    def _descriptor(self, shard: int) -> int:
        found = self._open.pop(shard, None)
        if found is None:
            url = self.index.url(shard)
            if is_remote(url):
                assert self.cache is not None
                path: str | Path = self.cache.path(url, **self._identity(shard))
            else:
                path = url
            found = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._open[shard] = found
        while len(self._open) > MAX_OPEN:
            os.close(self._open.popitem(last=False)[1])
        return found


def _close(descriptors: OrderedDict[int, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


def _same_size(field: bytes, size: int) -> bool:
    """Whether a header's size field says `size` (a pax or binary size is not compared)."""
    text = field.strip(b" \0")
    return not text.isdigit() or int(text, 8) == size


class ShardWriter:
    """Writes one shard through webdataset's writer; the tar appears under its name when it is whole.

    Bytes depend on nothing but the samples: no time, no user.
    """

    def __init__(self, path: Path) -> None:
        """Begin a tar at `path`."""
        from webdataset.writer import TarWriter

        self.path = path
        self._partial = path.with_name(f".{path.name}.part")
        self._file = open(self._partial, "wb")  # noqa: SIM115 (closed by close and abandon)
        self._tar = TarWriter(self._file, user="", group="", mtime=0, encoder=False)
        self.num_samples = 0

    def write(self, key: str, parts: Mapping[str, bytes]) -> None:
        """Append a sample. Keys have no dot in their last component and at most 100 ASCII characters with the part."""
        self._tar.write({"__key__": key, **parts})
        self.num_samples += 1

    def close(self) -> None:
        """Finish the tar, flush it to disk and give it its name."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._partial, self.path)

    def abandon(self) -> None:
        """Leave nothing behind."""
        with suppress(OSError):  # a full disk may be why the tar is abandoned
            self._tar.close()
            self._file.close()
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()
