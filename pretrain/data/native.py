"""The project's C++ for the host, compiled on first use for the processor at hand.

Owns: compiling one source file to a shared library in the user's cache folder, once per source and processor, safely
between processes. No compiler is no error: `library` returns None and the caller takes its torch path.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

# Sums may be reordered (to be vectorised), nothing else of IEEE 754 is given up.
FLAGS = ("-O3", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math")
TIMEOUT_S = 120


@cache
def library(source: Path) -> ctypes.CDLL | None:
    """The compiled library of a C++ file, or None where there is no compiler (`CXX`, c++, g++, clang++)."""
    compiler = _compiler()
    if compiler is None:
        return None
    flags = (*FLAGS, *_processor_flags())
    digest = hashlib.blake2b(digest_size=10)
    for part in (source.read_bytes(), " ".join((compiler, *flags)).encode(), _processor().encode()):
        digest.update(part)
    for folder in _folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            target = folder / f"{source.stem}-{digest.hexdigest()}.so"
            if not target.exists():
                _compile(compiler, flags, source, target)
            return ctypes.CDLL(str(target))
        except subprocess.SubprocessError as error:
            output = getattr(error, "stderr", None) or b""
            reason = output.decode(errors="replace").strip().splitlines()[:1] or [str(error)]
            warnings.warn(f"{compiler} could not compile {source.name} ({reason[0]}); slower paths run", stacklevel=2)
            return None
        except OSError:
            continue  # a read-only or noexec folder: the next one
    return None


def _compile(compiler: str, flags: tuple[str, ...], source: Path, target: Path) -> None:
    """Compile into a file of its own beside the target, then rename: another process sees all of it or nothing."""
    handle, name = tempfile.mkstemp(dir=target.parent, suffix=".so")
    os.close(handle)
    try:
        command = [compiler, *flags, "-o", name, str(source)]
        subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT_S)
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)


def _compiler() -> str | None:
    candidates = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def _processor_flags() -> tuple[str, ...]:
    if platform.machine() == "x86_64":
        return ("-march=native", "-mprefer-vector-width=512")
    return ("-mcpu=native",) if sys.platform != "win32" else ()


def _processor() -> str:
    """What -march=native depends on: nodes of one cluster may share a home folder and differ in this."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.platform()
    first = cpuinfo.read_text(errors="replace").split("\n\n")[0]
    return "\n".join(line for line in first.splitlines() if line.startswith(("flags", "Features", "model", "vendor")))


def _folders() -> tuple[Path, ...]:
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache_home / "akorn-pretrain", Path(tempfile.gettempdir()) / f"akorn-pretrain-{os.getuid()}"
