"""The C++ files of this folder, compiled on first use; None where they cannot be, and torch does their work."""

from __future__ import annotations

import ctypes
import platform
import warnings
from functools import cache
from pathlib import Path

from pretrain.native import NoCompilerError, NoLibraryError, load

# Sums may be reordered (to be vectorised), nothing else of IEEE 754 is given up.
FLAGS = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math")
WIDE = ("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()


@cache
def library(source: Path) -> ctypes.CDLL | None:
    """The compiled library of a C++ file; None without a compiler, and with a warning where it could not be made."""
    try:
        return load(source, (*FLAGS, *WIDE))
    except NoCompilerError:
        return None
    except NoLibraryError as error:
        warnings.warn(f"{error}; slower paths run", stacklevel=2)
        return None
