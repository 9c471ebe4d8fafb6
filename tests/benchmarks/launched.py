"""A run of `cluster/launch.py`, watched and harmed from outside, as a user and a cluster would."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cluster.state import WAITING, state_of
from cluster.submission import latest, read_lines
from cluster.tail import last_row

LAUNCHER = Path(__file__).resolve().parents[2] / "cluster" / "launch.py"
PATIENCE_S = 1200.0
_POLL_S = 0.1


class Run:
    """The run RUNS/NAME. Its commands return when they have been obeyed."""

    def __init__(self, runs: Path, name: str) -> None:
        self.home = runs / name

    def launch(self, config: str, *overrides: str) -> None:
        """Start a new run of a configuration."""
        where = [f"name={self.home.name}", f"runs_dir={self.home.parent}"]
        self._starting(config, *where, *overrides, "--detach")

    def resume(self, *overrides: str) -> None:
        """Go on, with other settings if there are any."""
        self._starting("resume", str(self.home), *overrides, "--detach")

    def cancel(self) -> None:
        """Have the run save and end."""
        self._command("cancel", str(self.home))

    def kill(self, chance: random.Random) -> int:
        """SIGKILL one of its ranks, wait until it trains again; how many steps had to be done twice."""
        record = latest(self.home)["pretrain"].record()
        assert record is not None
        supervisor = record.job_id
        ranks = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
        starts = len(self.events("started"))
        os.kill(int(chance.choice(ranks)), signal.SIGKILL)
        reached = self.step()
        self._wait_for_start(starts)
        return max(0, reached - int(self.events("started")[-1]["step"]))

    def reach(self, step: int) -> None:
        """Wait until so many steps are complete."""
        self._wait(lambda: self.step() >= step)

    def finish(self) -> None:
        """Wait for the end."""
        self._wait(lambda: self.state() == "finished")

    def state(self) -> str:
        return state_of(latest(self.home)["pretrain"]).name

    def step(self) -> int:
        """The last step whose metrics are written."""
        row = last_row(self.home / "metrics.jsonl")
        return 0 if row is None else int(row["step"])

    def processes(self) -> int:
        """Of its newest submission."""
        record = latest(self.home)["pretrain"].record()
        assert record is not None
        return record.processes

    def events(self, name: str) -> list[dict[str, Any]]:
        return [row for row in read_lines(self.home / "events.jsonl") if row["event"] == name]

    def metrics(self, name: str) -> list[float]:
        """One value of every step."""
        return [float(row[name]) for row in read_lines(self.home / "metrics.jsonl")]

    def _starting(self, *arguments: str) -> None:
        starts = len(self.events("started"))
        self._command(*arguments)
        self._wait_for_start(starts)

    def _wait_for_start(self, starts: int) -> None:
        self._wait(lambda: len(self.events("started")) > starts)

    def _command(self, *arguments: str) -> None:
        subprocess.run([sys.executable, str(LAUNCHER), *arguments], check=True)

    def _wait(self, condition: Any) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            alive = self.state() in (*WAITING, "finished")
            if not alive or time.monotonic() > deadline:
                raise RuntimeError(f"{self.home} is {self.state()} at step {self.step()}")
            time.sleep(_POLL_S)
