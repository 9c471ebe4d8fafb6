"""Indexing: builds the index of a shard set from the scans of its shards, restartable and in parallel.

Each shard's scan is kept in a small file of its own until all are there; `combine` then fills the index through a
memory map, so that neither step holds more than one shard in memory.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from configs.errors import UserError
from pretrain.data import columns
from pretrain.data.index import FORMAT, INDEX_NAME, fingerprint_of
from pretrain.data.location import Location, is_remote
from pretrain.data.scan import ShardScan, scan
from pretrain.data.staging import open_stream

MAX_NOTES = 200  # kept in an index; the rest is counted
MAX_COMPARED = 20_000_000  # keys compared across shards: 8 bytes each, sorted in memory


def ensure(where: Location, *, key_pattern: str, cache_dir: str | Path | None) -> Path:
    """Path of the index of these shards, built if there is none. Safe when several processes call it at once.

    Raises:
        UserError: the folder's index lists other shards than the folder holds; no place to write to.
    """
    for path in _places(where, cache_dir):
        if path.exists() and _matches(path, where, key_pattern):
            return path
    path = _writable(where, cache_dir)
    with _locked(path):
        if path.exists() and _matches(path, where, key_pattern):
            return path
        if not _fetch(where, path, key_pattern):
            build(where, path, key_pattern=key_pattern)
        path.with_name(f".{path.name}.lock").unlink(missing_ok=True)
    return path


def _places(where: Location, cache_dir: str | Path | None) -> list[Path]:
    """Where an index of these shards may be, best first."""
    name = f"index-{where.digest}.safetensors"
    here = [] if is_remote(where.base) else [Path(where.base) / INDEX_NAME, Path(where.base) / name]
    return [*here, _cache(cache_dir) / name]


def _cache(cache_dir: str | Path | None) -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "akorn"
    return Path(cache_dir or default).expanduser()


def _writable(where: Location, cache_dir: str | Path | None) -> Path:
    places = _places(where, cache_dir)
    if where.folder is None:
        places = [place for place in places if place.name != INDEX_NAME]
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(place.parent, os.W_OK):
            return place
    raise UserError(f"nowhere to write the index: not in {' nor in '.join(str(place.parent) for place in places)}")


def _matches(path: Path, where: Location, key_pattern: str) -> bool:
    arrays, metadata = columns.load(path)
    names = [bytes(name).rstrip(b"\0").decode("utf-8", "replace") for name in arrays.get("shard_name", [])]
    same_names = names == where.names
    if where.folder and path == Path(where.folder) / INDEX_NAME and not same_names:
        missing, added = sorted(set(names) - set(where.names)), sorted(set(where.names) - set(names))
        change = f"{missing[0]} is missing" if missing else f"{added[0]} was added" if added else "their order changed"
        raise UserError(
            f"the shards in {where.folder} changed since they were indexed: {change}; restore them, or delete {path} "
            "to index what is there now"
        )
    return same_names and metadata.get("format") == FORMAT and metadata.get("key_pattern") == key_pattern


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock falls when its holder dies."""
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch(where: Location, path: Path, key_pattern: str) -> bool:
    """Take over the index that lies beside remote shards, if it is there and lists exactly these."""
    if not is_remote(where.base) or where.base.startswith("pipe:"):
        return False
    partial = path.with_name(f".{path.name}.{os.getpid()}.fetched")
    try:
        with open_stream(where.base + INDEX_NAME) as source, open(partial, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        if not _matches(partial, where, key_pattern):
            return False
        os.replace(partial, path)
    except (OSError, UserError):
        return False
    finally:
        partial.unlink(missing_ok=True)
    return True


def build(where: Location, path: Path, *, key_pattern: str) -> None:
    """Scan all shards and write the index; what was scanned before an interruption is not scanned again."""
    folder = path.with_name(f".{path.name}.parts")
    folder.mkdir(parents=True, exist_ok=True)
    names = where.names
    targets = [folder / f"{shard:07d}.scan" for shard in range(len(names))]
    jobs = [
        (where.base, names[shard], target, key_pattern)
        for shard, target in enumerate(targets)
        if not _done(target, names[shard], key_pattern)
    ]
    # Threads, not processes: reading and checksums leave the interpreter, and the caller may be any script.
    with ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool:
        list(pool.map(_scan_job, jobs))  # raises what one of them raised
    combine(targets, path, key_pattern=key_pattern)
    shutil.rmtree(folder)


def _done(target: Path, name: str, key_pattern: str) -> bool:
    if not target.exists():
        return False
    try:
        metadata = columns.load(target)[1]
    except UserError:
        return False
    return metadata.get("name") == name and metadata.get("key_pattern") == key_pattern


def _scan_job(job: tuple[str, str, Path, str]) -> None:
    base, name, target, key_pattern = job
    try:
        with open_stream(base + name) as file:
            save_scan(scan(file, name, key_pattern=key_pattern), target, key_pattern=key_pattern)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"cannot write the index to {target.parent}: {error.strerror}; free some space") from error
        raise UserError(
            f"cannot read {base}{name}: {error.strerror or error}; check the address and start again (shards indexed "
            "so far are not read again)"
        ) from error


def save_scan(scanned: ShardScan, target: Path, *, key_pattern: str) -> None:
    """Keep a shard's scan until the index is put together."""
    encoded = [key.encode() for key in scanned.keys]
    arrays: columns.Arrays = {
        "keys": np.frombuffer(b"".join(encoded), np.uint8),
        "key_end": np.cumsum([len(key) for key in encoded], dtype=np.uint32),
        "key_hash": scanned.key_hash,
        "offset": scanned.offset,
        "size": scanned.size,
        "label": scanned.label,
    }
    metadata = {
        "name": scanned.name,
        "num_bytes": str(scanned.num_bytes),
        "sha256": scanned.sha256.hex(),
        "parts": json.dumps(scanned.parts),
        "notes": json.dumps(scanned.notes),
        "num_notes": str(scanned.num_notes),
        "key_pattern": key_pattern,
    }
    columns.write(target, arrays, metadata)


class _Totals:
    """What a first pass over the scans finds: sizes of the arrays to come, and everything that is small."""

    def __init__(self, scans: Sequence[Path]) -> None:
        self.names: list[str] = []
        self.notes: list[str] = []
        self.num_notes = 0
        parts: set[str] = set()
        self.num_bytes, self.counts, self.key_bytes = (np.zeros(len(scans), np.int64) for _ in range(3))
        self.sha256 = np.zeros((len(scans), 32), np.uint8)
        for shard, path in enumerate(scans):
            arrays, metadata = columns.load(path)
            self.names.append(metadata["name"])
            parts.update(json.loads(metadata["parts"]))
            self.num_bytes[shard] = int(metadata["num_bytes"])
            self.sha256[shard] = np.frombuffer(bytes.fromhex(metadata["sha256"]), np.uint8)
            self.counts[shard], self.key_bytes[shard] = len(arrays["label"]), len(arrays["keys"])
            self.num_notes += int(metadata["num_notes"])
            room = MAX_NOTES - len(self.notes)
            self.notes += [f"{metadata['name']}: {note}" for note in json.loads(metadata["notes"])[:room]]
        self.parts = sorted(parts)

    @property
    def metadata(self) -> dict[str, str]:
        return {
            "format": FORMAT,
            "parts": json.dumps(self.parts),
            "fingerprint": fingerprint_of(self.names, self.num_bytes, self.sha256, self.counts),
            "notes": json.dumps(self.notes),
            "num_notes": str(self.num_notes),
        }

    def shapes(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        S, N, E = len(self.names), int(self.counts.sum()), len(self.parts)
        width = max((len(name.encode()) for name in self.names), default=1)
        shapes: dict[str, tuple[type, tuple[int, ...]]] = {
            "shard_name": (np.uint8, (S, width)),
            "shard_bytes": (np.int64, (S,)),
            "shard_sha256": (np.uint8, (S, 32)),
            "shard_first": (np.int64, (S + 1,)),
            "key_first": (np.int64, (S + 1,)),
            "offset": (np.uint32, (N, E)),
            "size": (np.uint32, (N, E)),
            "label": (np.int32, (N,)),
            "key_end": (np.uint32, (N,)),
            "keys": (np.uint8, (int(self.key_bytes.sum()),)),
        }
        return {name: (np.dtype(dtype), shape) for name, (dtype, shape) in shapes.items()}


def combine(scans: Sequence[Path], path: Path, *, key_pattern: str) -> None:
    """Write the index from the scans of all shards in order, and `index.json` with its figures beside it.

    Raises:
        UserError: no sample in any shard.
    """
    totals = _Totals(scans)
    num_samples = int(totals.counts.sum())
    if num_samples == 0:
        first = f" ({totals.notes[0]})" if totals.notes else ""
        raise UserError(f"no samples in {len(scans)} shards, the first being {totals.names[0]}{first}")
    if num_samples <= MAX_COMPARED:
        _note_repeats(scans, totals)
    with columns.create(path, totals.shapes(), {**totals.metadata, "key_pattern": key_pattern}) as index:
        for shard, name in enumerate(totals.names):
            encoded = name.encode()
            index["shard_name"][shard, : len(encoded)] = np.frombuffer(encoded, np.uint8)
        index["shard_bytes"][:], index["shard_sha256"][:] = totals.num_bytes, totals.sha256
        index["shard_first"][1:], index["key_first"][1:] = np.cumsum(totals.counts), np.cumsum(totals.key_bytes)
        for shard, scanned in enumerate(scans):
            _fill(index, shard, scanned, totals.parts)
    figures = {
        "samples": num_samples,
        "shards": len(scans),
        "bytes": int(totals.num_bytes.sum()),
        "parts": totals.parts,
        "irregularities": totals.num_notes,
        "fingerprint": totals.metadata["fingerprint"],
    }
    write_text(path.with_suffix(".json"), json.dumps(figures, indent=1) + "\n")


def _fill(index: columns.Arrays, shard: int, scanned: Path, parts: list[str]) -> None:
    arrays, metadata = columns.load(scanned)
    rows = slice(int(index["shard_first"][shard]), int(index["shard_first"][shard + 1]))
    for column, part in enumerate(json.loads(metadata["parts"])):
        index["offset"][rows, parts.index(part)] = arrays["offset"][:, column]
        index["size"][rows, parts.index(part)] = arrays["size"][:, column]
    index["label"][rows], index["key_end"][rows] = arrays["label"], arrays["key_end"]
    index["keys"][int(index["key_first"][shard]) : int(index["key_first"][shard + 1])] = arrays["keys"]


def _note_repeats(scans: Sequence[Path], totals: _Totals) -> None:
    hashes = np.concatenate([columns.load(path)[0]["key_hash"] for path in scans])
    inside = sum(len(part) - len(np.unique(part)) for part in (columns.load(path)[0]["key_hash"] for path in scans))
    across = len(hashes) - len(np.unique(hashes)) - inside
    if across:
        totals.num_notes += across
        totals.notes.insert(0, f"{across} keys occur again in another shard")


def write_text(path: Path, text: str) -> None:
    """Write a small file that appears by rename."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    partial.write_text(text)
    os.replace(partial, path)
