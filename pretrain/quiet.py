"""Silence: what libraries print at the start that no user needs.

Owns: the one place that turns off DeepSpeed's log lines and banners and the warnings of third parties. Errors and
exceptions still come through, and everything does where someone asked for it (ASKED).
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

ASKED = ("NCCL_DEBUG", "TORCH_DISTRIBUTED_DEBUG", "TORCH_CPP_LOG_LEVEL")  # NCCL speaks most when DeepSpeed starts


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Import or initialise a noisy library inside. What it and its compilers print is swallowed, exceptions are not."""
    if any(name in os.environ for name in ASKED):
        yield
        return
    for name in ("DeepSpeed", "deepspeed"):
        logger = logging.getLogger(name)
        if _only_errors not in logger.filters:
            logger.addFilter(_only_errors)
    sys.stdout.flush()
    sys.stderr.flush()
    # Never closed: a library may keep the stream that it found for its log lines.
    nowhere = open(os.devnull, "w")  # noqa: SIM115
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        _swallowed(1, nowhere.fileno()),
        _swallowed(2, nowhere.fileno()),
    ):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _swallowed(descriptor: int, nowhere: int) -> Iterator[None]:
    """Send a file descriptor nowhere, for this process and those it starts."""
    kept = os.dup(descriptor)
    os.dup2(nowhere, descriptor)
    try:
        yield
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)


def _only_errors(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
