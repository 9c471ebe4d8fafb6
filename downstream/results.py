"""Results on disk: a score never travels without its protocol.

Owns: results.json (protocol, configuration, versions, commit, time), where it lies, the split of work in blocks that
processes share, and the bootstrap interval of a difference.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from configs.section import Section

PACKAGES = ("torch", "timm", "faiss-gpu", "fastcluster", "numpy", "scikit-learn")
_POLL_S, _PATIENCE_S = 0.2, 20.0


def folder_of(ckpt: str, task: str, *, out: str | Path | None, name: str | None) -> Path:
    """RUN/downstream/TASK for a run (and its export), results/TASK/NAME otherwise."""
    if out is not None:
        return Path(out)
    path = Path(ckpt)
    run = path.parent if path.name == "export" else path
    if (run / "config.yaml").is_file():
        return run / "downstream" / (name or task)
    label = re.sub(r"[^A-Za-z0-9._-]+", "_", path.stem if path.is_file() else ckpt).strip("_.")
    return Path("results") / task / (name or label or "none")


def write(folder: Path, task: str, config: Section, protocol: dict[str, Any], **content: Any) -> Path:
    """Write results.json; it appears whole, by rename."""
    document = {
        "task": task,
        "protocol": protocol,
        **content,
        "config": config.model_dump(mode="json"),
        "commit": commit(),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    return write_json(folder / "results.json", document)


def files_in(folder: Path) -> list[Path]:
    """The results.json files of a run's evaluations, or that of a folder of results."""
    return sorted([*folder.glob("downstream/*/results.json"), *folder.glob("results.json")])


def read(path: Path) -> dict[str, Any]:
    """What a results.json holds.

    Raises:
        UserError: it is damaged.
    """
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): evaluate again, or remove it") from None


def write_json(path: Path, content: Any) -> Path:
    """Write JSON by rename; NaN becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(_plain(content), indent=1, allow_nan=False) + "\n")
    os.replace(partial, path)
    return path


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return round(float(value), 6) if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def versions() -> dict[str, str]:
    """Versions of what scores depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of this code, with -dirty where files differ from it; None outside a repository.

    Of a job of the launcher, what that found (cluster/snapshot.py): the code that runs is a copy.
    """
    if "AKORN_COMMIT" in os.environ:
        return os.environ["AKORN_COMMIT"]
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    root = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def ranks() -> tuple[int, int]:
    """(rank, world_size) as the launcher sets them; (0, 1) without one."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def shared_blocks(folder: Path, count: int, work: Callable[[int], Any], *, timeout_s: float = 3600.0) -> list[Any]:
    """`work(block)` for every block, shared by the processes; each result is a JSON file in `folder`.

    Blocks that are there already are not computed again, so an interrupted evaluation goes on where it was, at any
    number of processes. Rank 0 waits for the others' files and returns all results, in order; the others return [].

    Raises:
        UserError: another process has not written its blocks within `timeout_s`.
    """
    rank, world_size = ranks()
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"block_{block:06d}.json" for block in range(count)]
    for block in range(rank, count, world_size):
        if not paths[block].exists():
            write_json(paths[block], work(block))
    if rank != 0:
        return []
    wait_for(lambda: all(path.exists() for path in paths), timeout_s, f"blocks in {folder}")
    return [json.loads(path.read_text()) for path in paths]


def key_of(*parts: Any) -> str:
    """Digest of what intermediate results depend on, this code included: they are never taken for something else."""
    summary = hashlib.sha256(repr(parts).encode())
    for source in sorted(Path(__file__).parent.glob("*.[pc]*")):
        if source.suffix in (".py", ".cpp"):
            summary.update(source.read_bytes())
    return summary.hexdigest()[:16]


def wait_for(ready: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Wait until `ready()`; the other processes of the evaluation are at work."""
    begin, said = time.monotonic(), False
    while not ready():
        waited = time.monotonic() - begin
        if waited > timeout_s:
            raise UserError(f"waited {timeout_s:.0f} s for {what} of another process: is one of them dead? start again")
        if waited > _PATIENCE_S and not said:
            others = f"RANK and WORLD_SIZE say that this is one of {ranks()[1]} processes"
            print(f"waiting for {what} of other processes; {others}: unset them to compute alone", flush=True)
            said = True
        time.sleep(_POLL_S)


def paired_bootstrap(
    ours: np.ndarray, theirs: np.ndarray, *, resamplings: int, seed: int = 0, level: float = 0.95
) -> dict[str, float]:
    """Mean difference of two models' scores on the same images, with a percentile interval over resampled images.

    Trainings repeated with other seeds are resampled too, each model's by themselves: the interval holds both spreads.
    Images for which any score is not defined are left out.

    Args:
        ours, theirs: scores of one training [N], or of S repetitions [S, N].
    """
    ours, theirs = np.atleast_2d(ours), np.atleast_2d(theirs)
    defined = np.isfinite(ours).all(0) & np.isfinite(theirs).all(0)
    ours, theirs = ours[:, defined], theirs[:, defined]
    if not defined.any():
        return {"difference": float("nan"), "low": float("nan"), "high": float("nan")}
    rng = np.random.default_rng(seed)

    def resampled() -> float:
        images = rng.integers(0, ours.shape[1], ours.shape[1])
        means = [some[rng.integers(0, len(some), len(some))].mean(0)[images].mean() for some in (ours, theirs)]
        return float(means[0] - means[1])

    means = [resampled() for _ in range(resamplings)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2]) if means else (np.nan, np.nan)
    return {"difference": float(ours.mean() - theirs.mean()), "low": float(low), "high": float(high)}
