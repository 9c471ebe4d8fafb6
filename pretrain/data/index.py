"""Index: where each part of each sample of a shard set lies. One memory-mapped file, shared by all processes.

A sample's id is its position in the index: shard by shard in the order of the shards' names (or as listed). Besides the
map a process holds a few numbers, whether the set has a thousand samples or a thousand million.

Arrays of the file (S shards, N samples, E kinds of parts; see columns.py for the container):
    shard_name    U8  [S, width]  base name, zero-padded      offset  U32 [N, E]  in blocks of 512 bytes, 0: absent
    shard_bytes   I64 [S]         size of the tar             size    U32 [N, E]  bytes
    shard_sha256  U8  [S, 32]                                 label   I32 [N]     NO_LABEL: none
    shard_first   I64 [S + 1]     id of its first sample      key_end U32 [N]     in `keys`, from the shard's key_first
    key_first     I64 [S + 1]     in `keys`                   keys    U8  [bytes of all keys]
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from configs.errors import UserError
from pretrain.data import columns
from pretrain.data.location import Location
from pretrain.data.scan import DEFAULT_KEY, NO_LABEL

INDEX_NAME = "index.safetensors"
FORMAT = "shard-index-1"

Parts = Mapping[str, str | Sequence[str]]


class ShardIndex:
    """A shard set as seen by readers. Picklable: another process maps the same file.

    Attributes:
        location: where the tars are.
        fingerprint: hexadecimal digest of the shards' names, sizes, checksums and sample counts.
        notes: what was wrong when the set was indexed, one line each (a ledger, not an error).
    """

    def __init__(self, path: Path, location: Location, *, parts: Parts | None = None) -> None:
        """Map the index file at `path`. Users call `ShardIndex.open`."""
        self.path, self.location, self._mapping = path, location, parts
        arrays, metadata = columns.load(path)
        if metadata.get("format") != FORMAT:
            raise UserError(f"{path} is no index of this version; delete it and it will be built again")
        try:
            self._arrays = arrays
            self.shard_first, self.shard_bytes = arrays["shard_first"], arrays["shard_bytes"]
            self.shard_sha256, self.labels = arrays["shard_sha256"], arrays["label"]
            self.stored_parts: list[str] = json.loads(metadata["parts"])
            self.fingerprint = metadata["fingerprint"]
            self.notes: list[str] = json.loads(metadata["notes"])
            self.num_notes = int(metadata["num_notes"])
        except (KeyError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it and it will be built again") from error
        self._columns = _columns(self.stored_parts, parts)

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self.path, self.location, self._mapping)

    @classmethod
    def open(
        cls,
        location: str | Path | Sequence[str],
        *,
        parts: Parts | None = None,
        key_pattern: str = DEFAULT_KEY,
        cache_dir: str | Path | None = None,
        check: bool = True,
    ) -> ShardIndex:
        """The index of a shard set, built in one pass over the tars where there is none.

        Args:
            location: folder of tars, brace pattern (`/data/{000..099}.tar`, URLs too), or a list of either.
            parts: name in the samples that are read -> name in the tars (several by preference: `"jpg;jpeg;png"`).
                Parts not named are left out. None: all parts under their own names.
            key_pattern: regular expression with groups `key` and `part`, for tars with another layout of names.
            cache_dir: where indices go whose folder cannot be written; default `~/.cache/akorn`.
            check: refuse a set with local shards of another size than indexed.

        Raises:
            UserError: no shards there; shards missing, added or of another size since they were indexed.
        """
        from pretrain.data.indexing import ensure

        where = Location.find(location)
        path = ensure(where, key_pattern=key_pattern, cache_dir=cache_dir)
        index = cls(path, where, parts=parts)
        if check:
            index.check_sizes()
        return index

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_shards(self) -> int:
        return len(self.shard_bytes)

    @property
    def shard_sizes(self) -> np.ndarray:
        """Samples in each shard. int64 [S]"""
        return np.diff(self.shard_first)

    @property
    def part_names(self) -> list[str]:
        """Names of the parts that samples may have."""
        return list(self._columns)

    @property
    def sources(self) -> dict[str, list[str]]:
        """Name of each part that samples may have -> its names in the tars, by preference."""
        return {name: [self.stored_parts[column] for column in found] for name, found in self._columns.items()}

    def url(self, shard: int) -> str:
        """Path or URL of a shard."""
        return self.location.base + self.shard_name(shard)

    def shard_name(self, shard: int) -> str:
        """Name of a shard below the set's folder, as in messages and ledgers."""
        return bytes(self._arrays["shard_name"][shard]).rstrip(b"\0").decode("utf-8", "replace")

    def shard_of(self, samples: np.ndarray) -> np.ndarray:
        """Shards of samples. int64 [n] -> int64 [n]"""
        return np.searchsorted(self.shard_first, samples, side="right") - 1

    def keys(self, samples: Sequence[int] | np.ndarray) -> list[str]:
        """Keys of samples, as in the tars."""
        ids = np.asarray(samples, np.int64)
        self._check_ids(ids)
        shards = self.shard_of(ids)
        base, end = self._arrays["key_first"], self._arrays["key_end"]
        starts = np.where(ids == self.shard_first[shards], 0, end[np.maximum(ids, 1) - 1])
        text = self._arrays["keys"]
        return [
            bytes(text[base[shard] + start : base[shard] + stop]).decode("utf-8", "replace")
            for shard, start, stop in zip(shards, starts.astype(np.int64), end[ids].astype(np.int64))
        ]

    def label(self, sample: int) -> int | None:
        """The integer of the part `cls`, None where there is none."""
        self._check_ids(np.asarray([sample]))
        value = int(self.labels[sample])
        return None if value == NO_LABEL else value

    def parts(self, sample: int) -> dict[str, tuple[int, int, int]]:
        """Name of each part the sample has -> (shard, offset in bytes, size in bytes)."""
        if not 0 <= sample < len(self):
            raise IndexError(f"samples are 0 to {len(self) - 1}, not {sample}")
        shard = int(self.shard_first.searchsorted(sample, side="right")) - 1
        offsets, sizes = self._arrays["offset"][sample].tolist(), self._arrays["size"][sample].tolist()
        found = {}
        for name, candidates in self._columns.items():
            for column in candidates:
                if offsets[column]:
                    found[name] = (shard, offsets[column] * 512, sizes[column])
                    break
        return found

    def warnings(self) -> list[str]:
        """What a user should know before training on this set: ledger, shards sorted by class. One line each."""
        found = []
        if self.num_notes:
            found.append(f"{self.num_notes} irregularities in the shards, the first: {self.notes[0]}")
        share = class_sorted_share(self.labels, self.shard_first)
        if share is not None:
            found.append(
                f"shards are sorted by class ({share:.0%} of neighbours share their label): windows will lack "
                "negatives of other classes; write them again with make_shards.py or raise data.window"
            )
        return found

    def check_sizes(self) -> None:
        """Compare local shards' sizes with the index. Remote ones are compared when they are staged.

        Raises:
            UserError: names the first shard that differs.
        """
        for shard, size in self.location.local_sizes():
            if size != self.shard_bytes[shard]:
                state = f"has {size} bytes, its index says {self.shard_bytes[shard]}" if size >= 0 else "is missing"
                raise UserError(
                    f"{self.url(shard)} {state}: it changed since it was indexed; restore it, or delete {self.path} "
                    "to index what is there now"
                )

    def _check_ids(self, ids: np.ndarray) -> None:
        if ids.size and not (ids.min() >= 0 and ids.max() < len(self)):
            raise IndexError(f"samples are 0 to {len(self) - 1}, not {ids.min()} to {ids.max()}")


def _reopen(path: Path, location: Location, parts: Parts | None) -> ShardIndex:
    return ShardIndex(path, location, parts=parts)


def _columns(stored: list[str], mapping: Parts | None) -> dict[str, list[int]]:
    """Columns that can supply each part, in order of preference."""
    if mapping is None:
        return {name: [column] for column, name in enumerate(stored)}
    found = {}
    for name, names in mapping.items():
        wanted = [text.strip().lower() for text in (names.split(";") if isinstance(names, str) else names)]
        found[name] = [stored.index(text) for text in wanted if text in stored]
        if not found[name]:
            there = ", ".join(stored[:10]) + (f" and {len(stored) - 10} more" if len(stored) > 10 else "")
            raise UserError(
                f"data.parts: no {' or '.join(wanted)} in these shards; they have {there}; data.key_pattern says how "
                "names are cut into keys and parts"
            )
    return found


def class_sorted_share(labels: np.ndarray, shard_first: np.ndarray, *, most: int = 1_000_000) -> float | None:
    """Share of neighbours with equal labels, if it is far above that of a shuffled set; else None.

    Args:
        labels: int32 [N]. shard_first: int64 [S + 1]. most: samples looked at, from the beginning.
    """
    labels = np.asarray(labels[:most])
    if len(labels) < 64 or (labels == NO_LABEL).any():
        return None
    counts = np.unique(labels, return_counts=True)[1]
    expected = float(((counts / len(labels)) ** 2).sum())
    inside = np.ones(len(labels) - 1, bool)
    borders = shard_first[(shard_first > 0) & (shard_first < len(labels))] - 1
    inside[borders] = False
    share = float((labels[1:] == labels[:-1])[inside].mean()) if inside.any() else 0.0
    return share if len(counts) > 1 and share > max(0.5, (1 + expected) / 2) else None


def fingerprint_of(names: Sequence[str], num_bytes: np.ndarray, sha256: np.ndarray, counts: np.ndarray) -> str:
    """Digest that two indices share exactly when their shards are the same in content and order."""
    digest = hashlib.sha256()
    for shard, name in enumerate(names):
        digest.update(f"{name}\0{num_bytes[shard]}\0{counts[shard]}\0".encode() + bytes(sha256[shard]))
    return digest.hexdigest()
