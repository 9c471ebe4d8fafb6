"""What background saving costs: wall time of the steps at and behind each checkpoint beyond that of other steps.

    python tests/benchmarks/saving.py quickstart.yaml [--steps 150] [--every 25] [key=value ...]

Trains for so many steps through the real trainer, saving `--every` steps. Printed is what one checkpoint costs, in
seconds and in steps (median over the checkpoints), and its share of the step time at the configured `save_every`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import itertools

import pretrain.session
from configs import PretrainConfig, load
from pretrain.train import run

WARM_UP = 10
WINDOW = 4  # steps looked at: the one that copies, and those beside which the write runs


class Timed:
    """A loader that notes when each step asks for its batch."""

    def __init__(self, loader: Any, times: list[float]) -> None:
        self._loader, self._times = loader, times

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __getitem__(self, step: int) -> Any:
        self._times.append(time.perf_counter())
        return self._loader[step]


def measure(config: PretrainConfig, every: int) -> tuple[float, float]:
    """(seconds of an ordinary step, seconds that a checkpoint adds), medians."""
    times: list[float] = []
    make_loader = pretrain.session._make_loader
    pretrain.session._make_loader = lambda *arguments: Timed(make_loader(*arguments), times)
    with tempfile.TemporaryDirectory() as folder:
        run(config, run_dir=Path(folder) / "run")
    steps = [after - before for before, after in itertools.pairwise(times)]
    near = [index for index in range(WARM_UP, len(steps)) if (index + 1) % every < WINDOW]
    ordinary = statistics.median(steps[index] for index in range(WARM_UP, len(steps)) if index not in near)
    starts = [index for index in near if (index + 1) % every == 0 and index + WINDOW <= len(steps)]
    return ordinary, statistics.median(sum(steps[index : index + WINDOW]) - WINDOW * ordinary for index in starts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--every", type=int, default=25)
    arguments = parser.parse_args(argv)
    usual = load(arguments.config, arguments.overrides)
    short = [f"steps={arguments.steps}", f"checkpoints.save_every={arguments.every}", "downstream=[]"]
    config = load(arguments.config, [*arguments.overrides, *short])
    assert isinstance(usual, PretrainConfig)
    assert isinstance(config, PretrainConfig)
    step_s, extra_s = measure(config, arguments.every)
    share = extra_s / (usual.checkpoints.save_every * step_s)
    print(
        f"step {1000 * step_s:.0f} ms; a checkpoint adds {1000 * extra_s:.0f} ms, {extra_s / step_s:.2f} steps: "
        f"{share:.2%} of the time at save_every={usual.checkpoints.save_every}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
