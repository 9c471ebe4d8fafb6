"""Making: a source becomes a shard set. Shuffled over the whole set, in parallel, and safe to interrupt.

Shard s holds the pictures at places [s*n, (s+1)*n) of one permutation drawn from the seed, less the broken ones: what a
shard holds depends on nothing but the plan, so that finished shards stand when the command is started again.
While it is being made the set lies in OUTPUT/.building (plan, scans, ledgers); the index and info.json appear last.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from configs.errors import UserError
from pretrain.data import columns
from pretrain.data.index import INDEX_NAME
from pretrain.data.indexing import combine, save_scan, write_text
from pretrain.data.scan import DEFAULT_KEY, scan
from pretrain.data.shards import ShardWriter
from pretrain.data.sources.picture import Finish
from pretrain.data.sources.sample import Broken, Sample, Source

INFO_NAME = "info.json"
BUILDING = ".building"
Progress = Callable[[int, int], None]
"""(pictures done, pictures broken), called from the main process."""


@dataclass(frozen=True)
class Plan:
    """What decides the bytes of a set, beside the source itself."""

    source: str
    input: str
    split: str
    settings: str
    num_pictures: int
    per_shard: int
    seed: int
    finish: Finish

    @property
    def num_shards(self) -> int:
        return -(-self.num_pictures // self.per_shard)

    def name(self, shard: int) -> str:
        """Base name of a shard: the split (or source), and its number with as many digits as the last one needs."""
        digits = max(6, len(str(self.num_shards - 1)))
        return f"{self.split or self.source}-{shard:0{digits}d}.tar"

    def pictures(self, shard: int) -> np.ndarray:
        """Numbers of the pictures of a shard. int64"""
        return _permutation(self.num_pictures, self.seed)[shard * self.per_shard : (shard + 1) * self.per_shard]


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, size]).permutation(size)


@dataclass(frozen=True)
class Outcome:
    """A finished set."""

    num_samples: int
    num_broken: int
    num_shards: int
    num_bytes: int
    was_there: bool = False


def make(
    source: Source, plan: Plan, out: Path, *, max_broken: float, workers: int, progress: Progress | None = None
) -> Outcome:
    """Write the set of `source` to the folder `out`, going on where an earlier call was interrupted.

    Args:
        max_broken: share of broken pictures above which nothing is finished.
        workers: processes; 0 or 1: this one.

    Raises:
        UserError: `out` holds something else; too many broken pictures; nothing to write; a full disk.
    """
    if plan.num_pictures == 0:
        raise UserError(f"{plan.source} {plan.split}: no pictures to write")
    if _finished(plan, out):
        return _outcome(out, was_there=True)
    building = _begin(plan, out)
    broken = 0
    try:
        for done, (pictures, lost) in enumerate(_write_all(source, plan, out, building, workers), 1):
            broken += lost
            if broken > max_broken * plan.num_pictures:
                raise UserError(_too_many(plan, building, broken, max_broken, done))
            if progress:
                progress(pictures, lost)
        _finish(source, plan, out, building)
    except OSError as error:
        raise UserError(f"writing {out} failed: {error}; once that is mended the same command goes on") from error
    return _outcome(out)


def _describe(plan: Plan) -> str:
    return json.dumps(asdict(plan), indent=1, sort_keys=True) + "\n"


def _finished(plan: Plan, out: Path) -> bool:
    info = out / INFO_NAME
    if not info.exists():
        return False
    try:
        made, wanted = json.loads(info.read_text()).get("plan") or {}, json.loads(_describe(plan))
        differing = [f"{key}: {made.get(key)} -> {value}" for key, value in wanted.items() if made.get(key) != value]
    except ValueError:
        differing = [f"{info} is damaged"]
    if differing:
        how = ", ".join(differing)
        raise UserError(f"{out} already holds a shard set made otherwise ({how}); remove it or choose another OUTPUT")
    return True


def _begin(plan: Plan, out: Path) -> Path:
    """The folder of the unfinished set, made or found again."""
    building = out / BUILDING
    described = building / "plan.json"
    if described.exists():
        if described.read_text() != _describe(plan):
            raise UserError(
                f"{out} holds an unfinished shard set with other settings; start it again as before, or remove {out}"
            )
    elif out.is_dir() and any(name.endswith(".tar") or name == INDEX_NAME for name in os.listdir(out)):
        raise UserError(f"{out} holds tars that are not of this command; choose another OUTPUT")
    try:
        building.mkdir(parents=True, exist_ok=True)
        write_text(described, _describe(plan))
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from error
    return building


def _write_all(source: Source, plan: Plan, out: Path, building: Path, workers: int) -> Iterator[tuple[int, int]]:
    """(pictures, broken) of each shard as it is finished, those of an earlier call first."""
    left = []
    for shard in range(plan.num_shards):
        ledger = building / f"{shard:07d}.broken"
        if ledger.exists() and (out / plan.name(shard)).exists():
            yield len(plan.pictures(shard)), len(ledger.read_text().splitlines())
        else:
            left.append(shard)
    if min(workers, len(left)) <= 1:
        for shard in left:
            yield write_shard(source, plan, out, building, shard)
        return
    import webdataset.writer  # noqa: F401 (once, before the fork)

    # Forked: workers share the source's tables (a million names) and start at once. They use no torch.
    context = get_context("fork")
    with ProcessPoolExecutor(min(workers, len(left)), context, _start_worker, (source, plan, out, building)) as pool:
        yield from pool.map(_work, left)


_job: tuple[Source, Plan, Path, Path] | None = None  # of a worker process


def _start_worker(source: Source, plan: Plan, out: Path, building: Path) -> None:
    global _job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the main process, which ends the workers
    _job = source, plan, out, building


def _work(shard: int) -> tuple[int, int]:
    assert _job is not None
    return write_shard(*_job, shard)


def write_shard(source: Source, plan: Plan, out: Path, building: Path, shard: int) -> tuple[int, int]:
    """Write one shard, its scan and its ledger (which says that the shard is done). Returns (pictures, broken)."""
    pictures, broken = plan.pictures(shard), []
    path = out / plan.name(shard)
    with ShardWriter(path) as writer:
        for sample in source.read(pictures):
            finished = plan.finish(sample) if isinstance(sample, Sample) else sample
            if isinstance(finished, Broken):
                broken.append(json.dumps({"shard": path.name, "key": finished.key, "reason": finished.reason}))
            else:
                writer.write(finished.key, finished.parts)
    with open(path, "rb", buffering=0) as file:
        save_scan(scan(file, path.name), building / f"{shard:07d}.scan", key_pattern=DEFAULT_KEY)
    write_text(building / f"{shard:07d}.broken", "".join(line + "\n" for line in broken))
    return len(pictures), len(broken)


def _too_many(plan: Plan, building: Path, broken: int, max_broken: float, shards: int) -> str:
    lines = [line for path in sorted(building.glob("*.broken")) for line in path.read_text().splitlines()]
    first = json.loads(lines[0]) if lines else {"key": "?", "reason": "?"}
    return (
        f"{broken} of the first {min(shards * plan.per_shard, plan.num_pictures)} pictures are broken, more than "
        f"--max-broken {max_broken:g} of all; the first: {first['key']}: {first['reason']}. All are listed in "
        f"{building}/*.broken; repair the source, or raise --max-broken and start again"
    )


def _finish(source: Source, plan: Plan, out: Path, building: Path) -> None:
    """Index, ledger and description; then the traces of the making go."""
    scans = [building / f"{shard:07d}.scan" for shard in range(plan.num_shards)]
    combine(scans, out / INDEX_NAME, key_pattern=DEFAULT_KEY)
    with open(out / "broken.jsonl", "w") as ledger:
        for shard in range(plan.num_shards):
            ledger.write((building / f"{shard:07d}.broken").read_text())
    write_text(out / INFO_NAME, json.dumps(_info(source, plan, out), indent=1) + "\n")
    shutil.rmtree(building)


def _info(source: Source, plan: Plan, out: Path) -> dict[str, object]:
    """Description of the set. `splits` is what timm's wds reader looks for."""
    arrays, metadata = columns.load(out / INDEX_NAME)
    counts = np.diff(arrays["shard_first"]).tolist()
    split = {
        "name": plan.split or "train",
        "num_samples": sum(counts),
        "filenames": [plan.name(shard) for shard in range(plan.num_shards)],
        "shard_lengths": counts,
    }
    return {
        "source": plan.source,
        "fingerprint": metadata["fingerprint"],
        "classes": list(source.classes),
        "broken": plan.num_pictures - sum(counts),
        "plan": asdict(plan),
        "splits": {split["name"]: split},
    }


def _outcome(out: Path, *, was_there: bool = False) -> Outcome:
    info, figures = (json.loads((out / name).read_text()) for name in (INFO_NAME, "index.json"))
    return Outcome(figures["samples"], info["broken"], figures["shards"], figures["bytes"], was_there)
