"""Errors that a user can cause, and how an entry point reports them.

Owns: the one exception class for them, and the exit codes (0 done, 1 our defect, 2 the user's input).
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

INTERRUPTED = 130  # exit code after Ctrl-C
# What a file system refuses for the user's own reasons: permissions, a full disk, a file where a folder is to be.
_REFUSALS = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}
)


class UserError(ValueError):
    """Something the user asked for cannot be done. The message says what, where, and what to do, in a line or two."""


def run(main: Callable[[], int | None]) -> int:
    """Run an entry point and return its exit code.

    A `UserError`, or a path that may not be written or read, is printed as `error: ...` without a traceback and returns
    2; Ctrl-C returns 130. Anything else is a defect of ours and keeps its traceback.
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
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        print(f"error: {error.filename or 'the disk'}: {error.strerror}", file=sys.stderr)
        return 2
