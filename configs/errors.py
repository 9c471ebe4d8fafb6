"""Errors that a user can cause, and how an entry point reports them.

Owns: the one exception class for them, and the exit codes (0 done, 1 our defect, 2 the user's input).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

INTERRUPTED = 130  # exit code after Ctrl-C


class UserError(ValueError):
    """Something the user asked for cannot be done. The message says what, where, and what to do, in a line or two."""


def run(main: Callable[[], int | None]) -> int:
    """Run an entry point and return its exit code.

    A `UserError` is printed as `error: ...` without a traceback and returns 2; Ctrl-C returns 130. Anything else is a
    defect of ours and keeps its traceback.
    """
    try:
        return main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
