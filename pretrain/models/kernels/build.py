"""Compiles klayer.cpp once per machine type and loads it; says why where that cannot be done.

Plain g++ (or $CXX) into a cache folder: no ninja, no headers of torch, a few seconds. The file name carries a hash of
the source, the flags and the processor, so that nodes of different kinds can share a home directory.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
FLAGS = (
    "-O3", "-march=native", "-fno-math-errno", "-std=c++17", "-fopenmp", "-shared", "-fPIC",
    "-fno-tree-loop-distribute-patterns",  # else short copies become calls of memcpy
)  # fmt: skip
COMPILERS = ("g++", "c++", "clang++")


@dataclass(frozen=True)
class Library:
    """The compiled kernels, or why there are none.

    Attributes:
        handle: the loaded library; None without one.
        bf16: whether it multiplies in bf16 (AMX).
        reason: one line for the user where `handle` is None.
    """

    handle: ctypes.CDLL | None
    bf16: bool = False
    reason: str = ""


def cache_folder() -> Path:
    """$AKORN_CACHE, else akorn in the user's cache folder."""
    if "AKORN_CACHE" in os.environ:
        return Path(os.environ["AKORN_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "akorn"


@functools.cache
def library() -> Library:
    """Compile (once per machine type, a few seconds) and load. Never raises: a failure is a Library with a reason."""
    missing = missing_instructions()
    if missing:
        return Library(None, reason=f"native kernels need {missing}, which this processor lacks: using PyTorch's own")
    compiler = find_compiler()
    try:
        path = compiled(compiler)
        handle = ctypes.CDLL(str(path))
        return Library(handle, bf16=bool(handle.has_bf16()))
    except FileNotFoundError:
        return Library(
            None, reason="no C++ compiler (g++, c++, clang++ or $CXX) found: using PyTorch's own kernels, slower"
        )
    except subprocess.CalledProcessError as error:
        detail = (error.stderr or "").strip().splitlines()[:1]
        return Library(None, reason=f"{compiler} could not compile the native kernels {detail}: using PyTorch's own")
    except OSError as error:
        return Library(None, reason=f"the native kernels could not be loaded ({error}): using PyTorch's own")


def missing_instructions() -> str:
    """What the processor lacks for the kernels ("" for nothing)."""
    if platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists():
        return "an x86-64 processor under Linux"
    return "" if "avx512bw" in processor_flags() else "AVX-512"


@functools.cache
def processor_flags() -> frozenset[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def find_compiler() -> str | None:
    names = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    return next((path for path in map(shutil.which, names) if path), None)


def sources() -> list[Path]:
    return sorted([*FOLDER.glob("*.h"), *FOLDER.glob("*.cpp")])


def cache_key() -> str:
    """What the compiled file depends on. The compiler's path is no part: a machine without one may use the cache."""
    text = [*(path.read_text() for path in sources()), *FLAGS, *sorted(processor_flags())]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


def compiled(compiler: str | None) -> Path:
    """Path of the shared library, compiled if the cache has none. Raises FileNotFoundError without a compiler."""
    folder = cache_folder()
    target = folder / f"klayer-{cache_key()}.so"
    if target.exists():
        return target
    if compiler is None:
        raise FileNotFoundError("no C++ compiler")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes of this machine wait for the first
        if not target.exists():
            part = target.with_suffix(f".{os.getpid()}.part")
            command = [compiler, *FLAGS, str(FOLDER / "klayer.cpp"), "-o", str(part)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            part.rename(target)
    return target
