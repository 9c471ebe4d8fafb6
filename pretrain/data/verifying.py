"""Verifying: an existing shard set against its index, byte by byte, every image decoded, every Sudoku checked."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pretrain.data.decode import BrokenImageError, decode_image, decode_mask
from pretrain.data.index import ShardIndex
from pretrain.data.scan import NO_LABEL, ShardScan, scan
from pretrain.data.shards import DamagedSample, ShardReader
from pretrain.data.sources.picture import MASKS, STORED
from pretrain.data.sudoku import record

MAX_LISTED = 100


@dataclass
class Report:
    """What verifying found; `problems` holds the first lines, `num_problems` counts all."""

    num_samples: int
    num_shards: int
    problems: list[str] = field(default_factory=list)
    num_problems: int = 0

    def add(self, lines: list[str]) -> None:
        self.num_problems += len(lines)
        self.problems += lines[: MAX_LISTED - len(self.problems)]


def verify(folder: Path, *, workers: int = 1) -> Report:
    """Compare every shard with the index (size, checksum, members) and decode every image and mask.

    Raises:
        UserError: no shards, or their list or sizes changed since they were indexed.
    """
    index = ShardIndex.open(folder)
    report = Report(len(index), index.num_shards)
    report.add([f"index: {note}" for note in index.notes])
    with ThreadPoolExecutor(workers) as pool:
        for lines in pool.map(lambda shard: _verify_shard(index, shard), range(index.num_shards)):
            report.add(lines)
    report.add(_info_problems(folder, index))
    return report


def _verify_shard(index: ShardIndex, shard: int) -> list[str]:
    name = index.shard_name(shard)
    with open(index.url(shard), "rb", buffering=0) as file:
        scanned = scan(file, name)
    if scanned.sha256 != bytes(index.shard_sha256[shard]):
        return [
            f"{name}: its checksum differs from the index: changed since indexing",
            *_differences(index, shard, scanned),
        ]
    reader = ShardReader(index)
    first, last = int(index.shard_first[shard]), int(index.shard_first[shard + 1])
    return [line for sample in range(first, last) for line in _verify_sample(reader, sample)]


def _differences(index: ShardIndex, shard: int, scanned: ShardScan) -> list[str]:
    expected = int(index.shard_sizes[shard])
    return [f"{scanned.name}: {len(scanned.keys)} samples, {expected} indexed"] if len(scanned.keys) != expected else []


def _verify_sample(reader: ShardReader, sample: int) -> list[str]:
    name = (
        f"{reader.index.shard_name(int(reader.index.shard_of(np.asarray(sample))))}: {reader.index.keys([sample])[0]}"
    )
    try:
        parts = reader.read(sample)
    except DamagedSample as error:
        return [str(error)]
    if set(parts) == {record.PART}:
        problem = record.problem(parts)
        return [f"{name}: {problem}"] if problem else []
    problems = []
    images = [part for part in parts if part in STORED]
    expected = int(any(part in STORED for part in reader.index.part_names))
    if len(images) != expected:
        problems.append(f"{name}: {len(images)} images")
    shapes = {}
    for part in (*images, *(part for part in MASKS if part in parts)):
        try:
            shapes[part] = (decode_mask if part in MASKS else decode_image)(parts[part]).shape[:2]
        except BrokenImageError as error:
            problems.append(f"{name}: {part}: {error}")
    if len(set(shapes.values())) > 1:
        problems.append(f"{name}: image and mask differ in size: {shapes}")
    if "cls" in parts and reader.index.labels[sample] == NO_LABEL:
        problems.append(f"{name}: its label is no integer")
    return problems


def _info_problems(folder: Path, index: ShardIndex) -> list[str]:
    """info.json belongs to these very shards."""
    path = folder / "info.json"
    if not path.exists():
        return []
    try:
        same = json.loads(path.read_text()).get("fingerprint") == index.fingerprint
    except ValueError:
        return ["info.json is damaged"]
    return [] if same else ["info.json describes other shards"]
