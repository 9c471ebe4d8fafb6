"""The C++ files of this folder, compiled on first use; None where they cannot be, and libraries do their work."""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from pathlib import Path

from pretrain.native import NoLibraryError, load

# Parts of -ffast-math: the whole of it would flush subnormal numbers in the entire process once the library is loaded.
_MATH = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-ffinite-math-only")
_FLAGS = (*_MATH, "-funroll-loops", "-pthread")


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """NAME.cpp compiled; None, with one warning, where that cannot be done. AKORN_NO_KERNELS=1 does without."""
    if os.environ.get("AKORN_NO_KERNELS") == "1":
        return None
    try:
        return load(Path(__file__).with_name(f"{name}.cpp"), _FLAGS)
    except NoLibraryError as error:
        warnings.warn(f"{name} does without its native kernel, several times slower: {error}", stacklevel=2)
        return None
