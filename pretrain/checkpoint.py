"""Checkpoints: whole or not at all, by parameter name, independent of world size and ZeRO stage.

Owns: the folder `checkpoints/step_00001234/` of a run,

    weights.safetensors   parameters (fp32) and buffers by name
    ema.safetensors       averaged parameters; absent before the first average
    moments.safetensors   `<parameter>.<moment>` of the optimizer
    state.json            step, stream position, counters, configuration, versions
    manifest.json         size and SHA-256 of each file; what it does not vouch for is damaged

which is written to a temporary sibling, synced and renamed. Nothing in it is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.tensorfile import checksum_of, read_tensors, write_tensors

FORMAT = 1
FILES = ("weights", "ema", "moments")


@dataclass(frozen=True)
class Snapshot:
    """A training state in host memory. `tensors` is keyed by file (weights, ema, moments), then by name."""

    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Complete steps."""
        return int(self.state["step"])


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is one checkpoint, rather than a run that has some."""
    return (path / "manifest.json").is_file()


def folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after so many complete steps lies."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def existing(run_dir: Path) -> list[tuple[int, Path]]:
    """Steps and folders of a run's checkpoints, damaged ones among them, oldest first."""
    found = [(path.name.removeprefix("step_"), path) for path in (run_dir / "checkpoints").glob("step_*")]
    return sorted((int(number), path) for number, path in found if number.isdigit() and path.is_dir())


def write(run_dir: Path, snapshot: Snapshot, *, allowed: Callable[[], None] = lambda: None) -> Path:
    """Write a checkpoint and return its folder. `allowed` raises where another life has taken over the run.

    Raises:
        OSError: it could not be written; what was there before is untouched.
    """
    final = folder(run_dir, snapshot.step)
    partial = final.with_name(f".{final.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        manifest: dict[str, Any] = {"format": FORMAT, "files": {}}
        for name, tensors in snapshot.tensors.items():
            file = partial / f"{name}.safetensors"
            manifest["files"][file.name] = {"sha256": write_tensors(file, tensors), "bytes": file.stat().st_size}
        state = json.dumps(snapshot.state, indent=1).encode()
        write_synced(partial / "state.json", state)
        manifest["files"]["state.json"] = {"sha256": hashlib.sha256(state).hexdigest(), "bytes": len(state)}
        write_synced(partial / "manifest.json", json.dumps(manifest, indent=1).encode())
        sync_folder(partial)
        allowed()
        _put_in_place(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def _put_in_place(partial: Path, final: Path) -> None:
    """Rename; a checkpoint of the same step that is there already (of a life that went back) steps aside."""
    aside = final.with_name(f".{final.name}.{os.getpid()}.old")
    if final.exists():
        final.rename(aside)
    partial.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make what a folder lists durable; some network file systems cannot, and need not."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def damage(path: Path) -> str | None:
    """Say what is wrong with a checkpoint; None: it is whole. Reads every byte of it."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            return f"it has format {manifest['format']}, this program reads {FORMAT}"
        for name, entry in manifest["files"].items():
            file = path / name
            if file.stat().st_size != entry["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}"
            if checksum_of(file) != entry["sha256"]:
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read ({type(error).__name__}: {error})"
    return None


def newest(run_dir: Path, *, report: Callable[[Path, str], None] = lambda path, reason: None) -> Path | None:
    """Return the newest whole checkpoint of a run, or None. `report` is told of damaged newer ones, and why."""
    for _, path in reversed(existing(run_dir)):
        reason = damage(path)
        if reason is None:
            return path
        report(path, reason)
    return None


def load(path: Path) -> Snapshot:
    """Read a checkpoint that `newest` or `damage` found whole."""
    state = json.loads((path / "state.json").read_text())
    files = {name: path / f"{name}.safetensors" for name in FILES}
    return Snapshot(state, {name: read_tensors(file) for name, file in files.items() if file.exists()})


def remove_old(run_dir: Path, *, keep_last: int, keep_every: int | None) -> None:
    """Remove checkpoints but the newest `keep_last` and those at multiples of `keep_every` steps."""
    for step, path in existing(run_dir)[:-keep_last]:
        if keep_every is None or step % keep_every:
            aside = path.with_name(f".{path.name}.{os.getpid()}.old")
            path.rename(aside)  # a reader sees a whole checkpoint or none
            shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(run_dir: Path) -> None:
    """Remove what killed processes left half written; only the run's owner may call this."""
    for path in (run_dir / "checkpoints").glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)
