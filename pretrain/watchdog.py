"""A thread that notices when the training hangs, says where, and ends the process so that it is started again.

Owns: how long a step may take, and what is said when it takes longer.
"""

from __future__ import annotations

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from pathlib import Path

EXIT_HUNG = 75
RECENT = 50  # steps whose median is the usual time


class Watchdog:
    """Ends this process when no step completes for `least_s` seconds or `factor` times the usual step, if longer.

    Args:
        report: text file that gets the rank, the step and the stack of every thread; standard error gets them too.
    """

    def __init__(self, report: Path, *, rank: int, least_s: float, factor: float) -> None:
        self._report, self._rank, self._least_s, self._factor = report, rank, least_s, factor
        self._durations: deque[float] = deque(maxlen=RECENT)
        self._last, self._step = time.monotonic(), 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start watching."""
        self.alive()
        self._thread.start()

    def beat(self, step: int) -> None:
        """A step is complete."""
        now = time.monotonic()
        self._durations.append(now - self._last)
        self._last, self._step = now, step

    def alive(self) -> None:
        """Something slow that is no step (saving, evaluating) begins or has ended."""
        self._last = time.monotonic()

    def limit_s(self) -> float:
        """Seconds that the running step may take."""
        usual = statistics.median(self._durations) if len(self._durations) >= 3 else 0.0
        return max(self._least_s, self._factor * usual)

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._least_s / 4)):
            silent_s = time.monotonic() - self._last
            if silent_s > self.limit_s():
                self._end(silent_s)

    def _end(self, silent_s: float) -> None:
        said = (
            f"rank {self._rank} hangs: nothing for {silent_s:.0f} s after step {self._step} "
            f"(limit {self.limit_s():.0f} s); it ends itself and is to be started again. Stacks of its threads:\n"
        )
        try:
            self._report.parent.mkdir(parents=True, exist_ok=True)
            with open(self._report, "a") as file:
                file.write(said)
                file.flush()
                faulthandler.dump_traceback(file)
        except OSError:
            pass  # the disk may be what hangs; standard error still tells
        print(said, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.__stderr__ or sys.stderr)
        os._exit(EXIT_HUNG)
