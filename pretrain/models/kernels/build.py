"""Compiles klayer.cpp once per machine type and loads it; says why where that cannot be done."""

from __future__ import annotations

import ctypes
import functools
import platform
from dataclasses import dataclass
from pathlib import Path

from pretrain.native import NoLibraryError, load, processor_flags

SOURCE = Path(__file__).with_name("klayer.cpp")
# Without the last, short copies become calls of memcpy.
FLAGS = ("-fno-math-errno", "-fopenmp", "-fno-tree-loop-distribute-patterns")


@dataclass(frozen=True)
class Library:
    """The compiled kernels, or why there are none.

    Attributes:
        handle: the loaded library; None without one.
        bf16: whether it multiplies in bf16 (by AMX or AVX512_BF16).
        reason: one line for the user where `handle` is None.
    """

    handle: ctypes.CDLL | None
    bf16: bool = False
    reason: str = ""


@functools.cache
def library() -> Library:
    """Compile (once per machine type, a few seconds) and load. Never raises: a failure is a Library with a reason."""
    missing = missing_instructions()
    if missing:
        return Library(None, reason=f"native kernels need {missing}, which this processor lacks: using PyTorch's own")
    try:
        handle = load(SOURCE, FLAGS)
    except NoLibraryError as error:
        return Library(None, reason=f"{error}: using PyTorch's own kernels, slower")
    return Library(handle, bf16=bool(handle.has_bf16()))


def missing_instructions() -> str:
    """What the processor lacks for the kernels ("" for nothing)."""
    if platform.machine() != "x86_64" or not processor_flags():
        return "an x86-64 processor under Linux"
    return "" if "avx512bw" in processor_flags() else "AVX-512"
