"""A copy of the code beside the run, so that a queued or restarted job runs what was submitted.

Owns: HOME/code/DIGEST/, named by the content of the source files: an unchanged tree is copied once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("cluster", "configs", "downstream", "pretrain")
_LEFT_OUT = ("__pycache__", ".ipynb_checkpoints")


def take(home: Path) -> Path:
    """Copy the packages into HOME/code/DIGEST, unless that is there, and return that folder (absolute)."""
    files = sorted(_files())
    digest = hashlib.sha256()
    for relative in files:
        digest.update(f"{relative}\0".encode() + (REPOSITORY / relative).read_bytes() + b"\0")
    target = home.absolute() / "code" / digest.hexdigest()[:12]
    if not target.is_dir():
        _copy(files, target)
    return target


def _copy(files: list[Path], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=".copy-"))
    for relative in files:
        (temporary / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / relative, temporary / relative)
    (temporary / "COMMIT").write_text(commit() + "\n", encoding="utf-8")
    temporary.chmod(0o755)
    try:
        temporary.rename(target)
    except OSError:  # another launcher copied the same code meanwhile
        shutil.rmtree(temporary)


def _files() -> Iterator[Path]:
    for package in PACKAGES:
        for folder, subfolders, names in os.walk(REPOSITORY / package):
            subfolders[:] = [name for name in subfolders if name not in _LEFT_OUT]
            for name in names:
                if not name.endswith((".pyc", ".tmp")):
                    yield (Path(folder) / name).relative_to(REPOSITORY)


def commit() -> str:
    """The commit of the working tree, with -dirty if it has changes; "unknown" outside of git."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
