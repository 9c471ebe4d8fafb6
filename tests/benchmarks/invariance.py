"""A training moved from 1 to 4 to 2 processes, killed and cut into micro-batches, against one that nothing happened to.

    python tests/benchmarks/invariance.py TRAIN_SHARDS TEST_SHARDS [--runs runs/invariance] [--only NAME] [--out FILE]

All are configs/quickstart.yaml in small (MODEL, fp32, native kernel), started, killed, cancelled and resumed through
cluster/launch.py:

    undisturbed   one process
    disturbed     PHASES: in each, a rank is killed at random moments; between them, `cancel` and `resume` elsewhere

With the number of processes the order of sums changes, and a training amplifies rounding: written is how long the
curves are equal, and whether the ends are the same in the mean. What is done in the folder of runs is not done again.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np

from cluster.submission import append_line, read_lines
from configs import ObjectDiscoveryConfig
from downstream import comparison, object_discovery
from downstream.results import paired_bootstrap, write_json
from tests.benchmarks.launched import Run

STEPS, BATCH = 2000, 16
MODEL = "{embed_dim: 64, num_heads: 4, num_steps: 4}"
PHASES = (  # (last step, kills, what changes)
    (700, 2, ("cluster.processes=1",)),
    (1400, 1, ("cluster.processes=4", "compute.micro_batch=2", "loading.workers=0")),
    (STEPS, 1, ("cluster.processes=2", "compute.micro_batch=null", "compute.zero_stage=1", "loading.workers=1")),
)
MARKS = (10, 100, 500, 700, 900, 1000, 1500, STEPS)
TOLERANCES = (1e-5, 1e-3)
LAST = 200
NAMES = ("undisturbed", "disturbed")


def overrides(shards: str) -> list[str]:
    return [
        f"steps={STEPS}", f"batch_size={BATCH}", f"model.args={MODEL}", f"data.shards={shards}", "downstream=[]",
        "compute.precision=fp32", "compute.kernel=native", "checkpoints.save_every=100", "monitor.log_every=1",
        "loading.workers=1", "cluster.gpus=0", "cluster.cpus_per_process=1",
    ]  # fmt: skip


def train(run: Run, shards: str) -> dict[str, Any]:
    """A run that nothing happens to."""
    run.launch("quickstart.yaml", *overrides(shards), *PHASES[0][2])
    run.finish()
    return {"kills": []}


def train_disturbed(run: Run, shards: str, seed: int = 0) -> dict[str, Any]:
    """A run through PHASES, from where it is. Returns how often it was killed and what that cost."""
    chance = random.Random(seed)
    log, begin = run.home / "kills.jsonl", 0
    for phase, (end, kills, changes) in enumerate(PHASES):
        if begin == 0 and not run.home.exists():
            run.launch("quickstart.yaml", *overrides(shards), *changes)
        elif run.processes() != int(changes[0].rpartition("=")[2]) and run.step() < end:
            run.cancel()
            run.resume(*changes)
        left = kills - sum(kill["phase"] == phase for kill in read_lines(log)) if run.step() < end - 10 else 0
        for moment in sorted(chance.sample(range(max(begin, run.step()) + 5, end - 5), left)):
            run.reach(moment)
            append_line(log, {"phase": phase, "step": moment, "twice": run.kill(chance)})
        begin = end
        run.reach(end)
    run.finish()
    starts = [{"step": start["step"], "processes": start["world_size"]} for start in run.events("started")]
    return {"kills": read_lines(log), "starts": starts}


def compare(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """Two curves [steps]: relative differences up to some steps, where they part, and the mean of the end."""
    assert len(ours) == len(theirs) == STEPS
    apart = [abs(a - b) / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "largest": {str(mark): max(apart[:mark]) for mark in MARKS},
        "steps_within": {
            str(limit): next((step for step, x in enumerate(apart) if x > limit), STEPS) for limit in (0.0, *TOLERANCES)
        },
        "end": {"undisturbed": statistics.fmean(theirs[-LAST:]), "disturbed": statistics.fmean(ours[-LAST:])},
        "end_difference": paired_bootstrap(np.array(ours[-LAST:]), np.array(theirs[-LAST:]), resamplings=2000),
        "end_step_difference": statistics.fmean(apart[-LAST:]),
    }


def evaluate(run: Run, scenes: str) -> None:
    """Object discovery of a run's export, by the protocol of Tetrominoes."""
    controls = ["random"] if run.home.name == NAMES[0] else []
    asked = {
        "ckpt": str(run.home), "data": scenes, "preset": "tetrominoes", "controls": controls, "baselines": [],
        "pictures": 0,
    }  # fmt: skip
    object_discovery.run(ObjectDiscoveryConfig.model_validate_json(json.dumps(asked)))


def make(run: Run, train_shards: str, test_shards: str) -> dict[str, Any]:
    """Train and evaluate one of NAMES, unless that has been done. Returns what happened to it, and its curve."""
    record = run.home / "happened.json"
    if not record.exists():
        happened = (train if run.home.name == NAMES[0] else train_disturbed)(run, train_shards)
        evaluate(run, test_shards)
        write_json(record, happened)
    return {**json.loads(record.read_text()), "losses": run.metrics("loss")}


def markdown(curve: dict[str, Any]) -> str:
    """Largest relative difference of the loss from the undisturbed run's, up to some steps."""
    head = ["up to step", *curve["largest"]]
    row = ["largest relative difference of the loss", *(f"{x:.0e}" if x else "0" for x in curve["largest"].values())]
    return "".join("| " + " | ".join(line) + " |\n" for line in (head, ["---"] * len(head), row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--runs", type=Path, default=Path("runs/invariance"))
    parser.add_argument("--only", choices=NAMES, help="make this run, compare nothing")
    parser.add_argument("--out", type=Path, default=Path("invariance.json"))
    asked = parser.parse_args()
    names = NAMES if asked.only is None else (asked.only,)
    made = {name: make(Run(asked.runs, name), asked.train, asked.test) for name in names}
    if asked.only is not None:
        return
    theirs, ours = (happened.pop("losses") for happened in made.values())
    scores = comparison.collect([asked.runs / name for name in NAMES])
    result = {**scores, "curve": compare(ours, theirs), **made["disturbed"]}
    asked.out.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result["curve"]), comparison.markdown(scores), json.dumps(made["disturbed"]), sep="\n")
    print({key: value for key, value in result["curve"].items() if key != "largest"})


if __name__ == "__main__":
    main()
