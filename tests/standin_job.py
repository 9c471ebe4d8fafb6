"""Stand-ins for what jobs run, without torch: a training that counts steps, an evaluation, a report.

Tests of the launcher put them in place of the real entries. The training behaves as the real one does towards the
launcher: it goes on from its newest checkpoint, writes metrics and events, saves and ends when it is told to.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

STEP_S = "STANDIN_STEP_S"  # environment variable: seconds a step takes
BREAK = "STANDIN_BREAK"  # environment variable: an evaluation of this name fails
EVALUATION_S = "STANDIN_EVALUATION_S"  # environment variable: seconds an evaluation takes, whatever it is told

_stop = {"asked": False}


def _on_stop(*_: object) -> None:
    _stop["asked"] = True


def train(config: Any, *, observers: Any, run_dir: Path) -> SimpleNamespace:
    """Count to config.steps; "preempted" after USR2."""
    signal.signal(signal.SIGUSR2, _on_stop)
    is_first = os.environ["RANK"] == "0"
    checkpoints = run_dir / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    start = max((int(path.name[5:]) for path in checkpoints.glob("step_*")), default=0)
    if is_first:
        _append(run_dir / "events.jsonl", event="started", step=start, steps=config.steps)
    for step in range(start + 1, config.steps + 1):
        time.sleep(float(os.environ.get(STEP_S, "0.01")))
        asked = _stop["asked"] or os.environ.get("AKORN_STOP_REQUESTED") == "1"
        if is_first:
            _append(run_dir / "metrics.jsonl", step=step, loss=1 / step, step_s=0.01, generation=_generation())
            if step % 10 == 0 or asked:
                (checkpoints / f"step_{step:08d}").mkdir(exist_ok=True)
        if asked:
            return SimpleNamespace(status="preempted")
    return SimpleNamespace(status="finished")


def evaluate(config: Any, *, out_dir: Path) -> dict[str, Any]:
    """Write results that say with which processes they were made."""
    if os.environ.get(BREAK) == config.name:
        raise RuntimeError("broken on purpose")
    time.sleep(float(os.environ.get(EVALUATION_S, "0")))
    out_dir.mkdir(parents=True, exist_ok=True)
    place = {key: os.environ[key] for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "AKORN_COMMIT")}
    if place["RANK"] == "0":
        (out_dir / "results.json").write_text(json.dumps({"ckpt": config.ckpt, **place}))
    return {}


def report(home: Path) -> None:
    names = sorted(path.parent.name for path in home.glob("downstream/*/results.json"))
    (home / "report.html").write_text(" ".join(names))


def _generation() -> int:
    return int(os.environ["AKORN_GENERATION"])


def _append(path: Path, **row: Any) -> None:
    with path.open("a") as file:
        file.write(json.dumps({**row, "time": time.time()}) + "\n")
