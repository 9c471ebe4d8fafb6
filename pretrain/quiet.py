"""Silence: what libraries print at the start that no user needs.

Owns: the one place that turns off DeepSpeed's log lines and banners and the warnings of third parties. Errors and
exceptions still come through.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Import or initialise a noisy library inside; standard output is swallowed, exceptions are not."""
    for name in ("DeepSpeed", "deepspeed"):
        logger = logging.getLogger(name)
        if _only_errors not in logger.filters:
            logger.addFilter(_only_errors)
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        warnings.simplefilter("ignore")
        yield


def _only_errors(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
