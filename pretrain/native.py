"""The project's C++, compiled on first use for the processor at hand: plain g++ (or $CXX), a few seconds, no ninja.

Owns: one shared library per source in the user's cache folder. Its name carries a hash of what it depends on: the
source and the headers beside it, the flags, and the processor, since nodes of different kinds may share a home folder.
The compiler is no part of it: a machine without one may use the cache. Callers say what they do without a library.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

COMPILERS = ("g++", "c++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC")
TIMEOUT_S = 120


class NoLibraryError(Exception):
    """There is no library; the message is one line that says why."""


class NoCompilerError(NoLibraryError):
    """Nor a compiler to make it."""


def load(source: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    """The library of a C++ file compiled with FLAGS and these. Raises NoLibraryError. Safe between processes.

    The first folder that can be written and loaded from is used: $AKORN_CACHE, else akorn in the user's cache folder,
    then one in the system's folder for temporary files.
    """
    name = f"{source.stem}-{_hash(source, flags)}.so"
    reason = ""
    for folder in _folders():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _refuse_open(folder)
            target = folder / name
            if not target.exists():
                _compile(source, flags, target)
            return ctypes.CDLL(str(target))
        except OSError as error:
            reason = f"{source.stem} could not be loaded from {folder} ({error})"
    raise NoLibraryError(reason)


def find_compiler() -> str | None:
    """Path of $CXX, or else of the first compiler known."""
    names = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    return next((path for path in map(shutil.which, names) if path), None)


@functools.cache
def processor_flags() -> frozenset[str]:
    """Instruction sets by the kernel's names; empty where it does not say."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    listed = (line.split(":", 1)[1] for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(listed, "").split())


def _compile(source: Path, flags: tuple[str, ...], target: Path) -> None:
    """Compile into a file of its own beside the target, then rename: another process sees all of it or nothing."""
    compiler = find_compiler()
    if compiler is None:
        raise NoCompilerError("no C++ compiler (g++, c++, clang++ or $CXX) found")
    handle, part = tempfile.mkstemp(dir=target.parent, suffix=".part")
    os.close(handle)
    machine = "-march=native" if platform.machine() == "x86_64" else "-mcpu=native"
    try:
        command = [compiler, *FLAGS, machine, *flags, "-o", part, str(source)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT_S)
        os.replace(part, target)
    except subprocess.SubprocessError as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        detail = next((line for line in lines if "error:" in line), lines[0])
        raise NoLibraryError(f"{compiler} could not compile {source.name} ({detail})") from error
    finally:
        Path(part).unlink(missing_ok=True)


def _hash(source: Path, flags: tuple[str, ...]) -> str:
    files = [source, *sorted(source.parent.glob("*.h"))]
    text = [*(path.read_text() for path in files), *FLAGS, *flags, platform.machine(), *sorted(processor_flags())]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


def _refuse_open(folder: Path) -> None:
    """Raise an OSError for a folder of temporary files in which another user may have put a library."""
    found = folder.stat()
    if folder.parent == Path(tempfile.gettempdir()) and (found.st_uid != os.getuid() or found.st_mode & 0o022):
        raise PermissionError("others can write there")


def _folders() -> Iterator[Path]:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    yield Path(os.environ["AKORN_CACHE"]) if "AKORN_CACHE" in os.environ else home / "akorn"
    yield Path(tempfile.gettempdir()) / f"akorn-{os.getuid()}"
