"""A training that is harmed again and again, and must come out as if nothing had happened.

python tests/chaos.py --seed 0 --faults 100

Trains the stand-in task (tests/standin_run.py) through the real trainer and loader, on real processes, while this
program plays the launcher and the disaster at once: it kills ranks, stops them, signals them, damages and cuts
checkpoints and shards (which are put right again), fills the disk, starts a second life beside a running one and
changes the world size. Batches of NaN lie in the data all along. In the end the run must have each step once, must
never have gone back behind its last whole checkpoint, must have said what happened, and must equal an undisturbed run
bitwise: in its weights if neither world size nor data ever changed, else in its losses up to the first such change.
At the end its loss is that of the undisturbed run within 5 %; where data was damaged, within a quarter of what was
learned.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import socket
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pretrain import checkpoint
from tests.standin import context
from tests.standin_run import events, final_weights, rows, run_standin, write_vectors

SAVE_EVERY = 5
PATIENCE_S = 240.0  # for a life to do something; machines of tests are busy
WORLD_SIZE = 2  # of the undisturbed run
FAULTS = (
    "kill one",
    "kill all",
    "preempt",
    "hang",
    "damage",
    "truncate",
    "damage shard",
    "truncate shard",
    "disk full",
    "two lives",
    "world size",
)
DATA = {"damage shard", "truncate shard"}  # after these the run learned from other samples for a while
CHANGES = {*DATA, "world size"}  # after these the weights need not be bitwise equal


@dataclass
class Life:
    """The processes of one start of the run."""

    world_size: int
    generation: int
    processes: list[Any] = field(default_factory=list)

    def alive(self) -> list[Any]:
        return [process for process in self.processes if process.is_alive()]

    def end(self) -> None:
        """Kill what is left, as a launcher does when one rank is gone."""
        for process in self.processes:
            process.kill()
            process.join()

    def finished(self) -> bool:
        return not self.alive() and all(process.exitcode == 0 for process in self.processes)


def start(run_dir: Path, life: Life, changes: dict[str, Any], environment: dict[str, str]) -> Life:
    """Start the ranks of a life."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for rank in range(life.world_size):
        place = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(life.world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "AKORN_GENERATION": str(life.generation),
        }
        arguments = (str(run_dir), changes, {**environment, **place}, str(run_dir.with_name("output.txt")))
        process = context().Process(target=_rank, args=arguments)
        process.start()
        life.processes.append(process)
    return life


def _rank(run_dir: str, changes: dict[str, Any], environment: dict[str, str], output: str) -> None:
    os.environ.update(environment, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    run_standin(run_dir, changes)


class Chaos:
    """One training and its disasters."""

    def __init__(self, folder: Path, *, seed: int, faults: int, kinds: Sequence[str]) -> None:
        self.random = random.Random(seed)
        self.run_dir, self.shards, self.kinds, self.left = folder / "run", folder / "shards", kinds, faults
        write_vectors(self.shards)
        self.steps = max(40, 6 * faults)
        bad = self.random.sample(range(self.steps), 2)
        self.environment = {"STANDIN_NAN": ",".join(map(str, bad)), "STANDIN_STEP_S": "0.01"}
        self.changes: dict[str, Any] = {
            "steps": self.steps,
            "checkpoints": {"save_every": SAVE_EVERY, "keep_last": 3},
            "monitor": {"log_every": 1, "tensorboard": False},
            "resilience": {"watchdog_s": 10.0, "watchdog_factor": 1.0},
            "data": {"shards": str(self.shards), "window": 2, "max_broken": 1.0},
        }
        self.world_size, self.generation, self.done = WORLD_SIZE, 0, Counter[str]()
        self.disk_full = False
        self.exact_until = self.steps  # steps whose losses equal those of the undisturbed run bitwise

    def begin(self) -> Life:
        """Start the next life; it must begin where the newest whole checkpoint ends."""
        newest = checkpoint.newest(self.run_dir)
        expected = 0 if newest is None else checkpoint.load(newest).step
        started = self._count("started")
        if self.world_size != WORLD_SIZE:
            self.exact_until = min(self.exact_until, expected)
        self.generation += 1
        full = {"STANDIN_DISK_FULL": "1"} if self.disk_full else {}
        life = start(self.run_dir, Life(self.world_size, self.generation), self.changes, {**self.environment, **full})
        _wait(lambda: self._count("started") > started or not life.alive())
        if self._count("started") > started:
            last = [event for event in events(self.run_dir) if event["event"] == "started"][-1]
            assert last["step"] == expected, f"a life began at step {last['step']}, the checkpoint was of {expected}"
        return life

    def run(self) -> None:
        """Live and die until the run is finished."""
        life = self.begin()
        while True:
            if self.left > 0:
                self._let_it_run(life)
                life = self._harm(life)
            else:
                _wait(lambda current=life: not current.alive())
            if not life.alive() and life.finished() and self._count("finished"):
                return
            if not life.alive() or len(life.alive()) < life.world_size:
                life.end()
                life = self.begin()

    def _let_it_run(self, life: Life) -> None:
        """Wait until the life has done a random number of steps, or has ended."""
        goal = self._last_step() + self.random.randrange(1, 2 * SAVE_EVERY)
        _wait(lambda: self._last_step() >= goal or not life.alive())

    def _harm(self, life: Life) -> Life:
        kind = self.random.choice(self.kinds)
        self.left -= 1
        self.done[kind] += 1
        victims = life.alive()
        if not victims:
            return life
        self.disk_full = kind == "disk full"
        if kind == "two lives":
            return self._two_lives(life)
        if kind in ("damage shard", "truncate shard"):
            self._damage_shard(kind, life)
            return life
        if kind == "preempt":
            os.kill(self.random.choice(victims).pid, signal.SIGUSR2)
            _wait(lambda: not life.alive())
            return life
        if kind == "hang":
            os.kill(self.random.choice(victims).pid, signal.SIGSTOP)
            if life.world_size > 1:  # the others' watchdogs end them; a process that is stopped alone notices nothing
                _wait(lambda: len(life.alive()) < life.world_size)
        elif kind == "kill one":
            os.kill(self.random.choice(victims).pid, signal.SIGKILL)
        life.end()
        if kind in ("damage", "truncate"):
            self._damage(kind)
        elif kind == "world size":
            self.world_size = self.random.choice([n for n in (1, 2, 4) if n != self.world_size])
        return life

    def _damage(self, kind: str) -> None:
        existing = checkpoint.existing(self.run_dir)
        if not existing:
            return
        file = self.random.choice(sorted(existing[-1][1].iterdir()))
        data = bytearray(file.read_bytes())
        if kind == "truncate":
            del data[len(data) // 2 :]
        else:
            data[self.random.randrange(len(data))] ^= 0xFF
        file.write_bytes(data)

    def _damage_shard(self, kind: str, life: Life) -> None:
        """Harm a shard under a running life, for an epoch, and put it right."""
        file = self.random.choice(sorted(self.shards.glob("*.tar")))
        whole = file.read_bytes()
        self.exact_until = min(self.exact_until, self._last_step())
        if kind == "truncate shard":
            os.truncate(file, len(whole) // 4)
        else:
            first = self.random.randrange(len(whole) // 2)
            file.write_bytes(whole[:first] + self.random.randbytes(len(whole) // 4) + whole[first + len(whole) // 4 :])
        goal = self._last_step() + 5
        _wait(lambda: self._last_step() >= goal or not life.alive())
        file.write_bytes(whole)

    def _two_lives(self, older: Life) -> Life:
        """Start a life while another runs: the older one must end by itself and leave the run alone."""
        self.generation += 1
        younger = start(self.run_dir, Life(self.world_size, self.generation), self.changes, self.environment)
        _wait(lambda: not older.alive() or not younger.alive())
        _wait(lambda: not older.alive())
        older.end()
        return younger

    def _last_step(self) -> int:
        try:
            return max((row["step"] for row in rows(self.run_dir)), default=0)
        except (FileNotFoundError, ValueError):
            return 0

    def _count(self, event: str) -> int:
        try:
            return sum(row["event"] == event for row in events(self.run_dir))
        except (FileNotFoundError, ValueError):
            return 0

    def judge(self, folder: Path) -> str:
        """Compare with an undisturbed run. Returns a line that says what held; raises AssertionError otherwise."""
        reference = start(folder / "reference", Life(WORLD_SIZE, 1), self.changes, self.environment)
        _wait(lambda: not reference.alive())
        assert reference.finished(), "the undisturbed run failed"
        ours, theirs = rows(self.run_dir), rows(folder / "reference")
        assert [row["step"] for row in ours] == list(range(1, self.steps + 1)), "a step is missing or stands twice"
        assert [row["skipped"] for row in ours] == [row["skipped"] for row in theirs]
        if self.done["damage"] + self.done["truncate"] > 2:
            assert self._count("damaged"), "damage was not mentioned"
        if self.done["damage shard"] + self.done["truncate shard"] > 2:
            assert (self.run_dir / "skipped.jsonl").read_text(), "damaged samples were not mentioned"
        exact = [row["loss"] for row in ours[: self.exact_until]]
        assert exact == [row["loss"] for row in theirs[: self.exact_until]], "losses differ before anything changed"
        weights, expected = final_weights(self.run_dir), final_weights(folder / "reference")
        largest = max(float((weights[name] - tensor).abs().max()) for name, tensor in expected.items())
        changed = sorted(CHANGES & set(self.done))
        assert changed or largest == 0, f"weights differ by up to {largest:.2g} from those of the undisturbed run"
        final, undisturbed = (_mean([row["loss"] for row in run[-10:]]) for run in (ours, theirs))
        fall = _mean([row["loss"] for row in theirs[:10]]) - undisturbed
        tolerance = 0.25 * fall if DATA & set(self.done) else 0.05 * undisturbed
        assert abs(final - undisturbed) < tolerance, f"loss {final} against {undisturbed}, which fell by {fall}"
        kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(self.done.items()))
        equal = f"equal to {largest:.2g} ({', '.join(changed)})" if largest else "bitwise equal"
        return (
            f"{self.steps} steps, {self.generation} lives, {kinds}: each step once, losses bitwise equal up to step "
            f"{self.exact_until}, weights {equal}"
        )


def _mean(losses: Sequence[float | None]) -> float:
    """Of steps that were applied."""
    return statistics.mean(loss for loss in losses if loss is not None)


def _wait(condition: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for too long"
        time.sleep(0.02)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chaos from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=10)
    parser.add_argument("--kinds", nargs="+", choices=FAULTS, default=FAULTS, help="disasters to choose from")
    parser.add_argument("--folder", type=Path, help="where to leave the run (default: a temporary folder, removed)")
    arguments = parser.parse_args(argv)
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="chaos"))
    folder.mkdir(parents=True, exist_ok=True)
    chaos = Chaos(folder, seed=arguments.seed, faults=arguments.faults, kinds=arguments.kinds)
    try:
        chaos.run()
        print(chaos.judge(folder))
    finally:
        for process in multiprocessing.active_children():  # a disaster of ours must outlive nobody
            process.kill()
    if arguments.folder is None:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
