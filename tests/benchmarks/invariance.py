"""A training moved from 1 to 4 to 2 processes, killed and cut into micro-batches, against one that nothing happened to.

    python tests/benchmarks/invariance.py TRAIN_SHARDS TEST_SHARDS [--runs runs/invariance] [--only NAME] [--out FILE]

All are configs/quickstart.yaml in small (MODEL, fp32, native kernel), started, killed, cancelled and resumed through
cluster/launch.py:

    undisturbed   one process
    rounding      one process, micro-batches: nothing happens, only sums are formed in another order
    disturbed     PHASES: in each, a rank is killed at random moments; between them, `cancel` and `resume` elsewhere

The two undisturbed ones part as well, since a training amplifies rounding: how far is the measure for the disturbed.
What is done in the folder of runs is not done again.
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

from cluster.submission import append_line, read_lines
from configs import ObjectDiscoveryConfig
from downstream import comparison, object_discovery
from downstream.results import write_json
from tests.benchmarks.launched import Run

STEPS, BATCH = 2000, 16
MODEL = "{embed_dim: 64, num_heads: 4, num_steps: 4}"
PHASES = (  # (last step, kills, what changes)
    (700, 2, ("cluster.processes=1",)),
    (1400, 1, ("cluster.processes=4", "compute.micro_batch=2", "loading.workers=0")),
    (STEPS, 1, ("cluster.processes=2", "compute.micro_batch=null", "compute.zero_stage=1", "loading.workers=1")),
)
MARKS = (10, 100, 500, 700, 800, 1000, 1500, 2000)
TOLERANCES = (1e-5, 1e-3)
LAST = 200
NAMES = ("undisturbed", "rounding", "disturbed")


def overrides(shards: str) -> list[str]:
    return [
        f"steps={STEPS}", f"batch_size={BATCH}", f"model.args={MODEL}", f"data.shards={shards}", "downstream=[]",
        "compute.precision=fp32", "compute.kernel=native", "checkpoints.save_every=100", "monitor.log_every=1",
        "loading.workers=1", "cluster.gpus=0", "cluster.cpus_per_process=1",
    ]  # fmt: skip


def train(run: Run, shards: str, *changes: str) -> dict[str, Any]:
    """A run that nothing happens to."""
    run.launch("quickstart.yaml", *overrides(shards), *changes)
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
        "end": statistics.fmean(ours[-LAST:]),
        "end_difference": statistics.fmean(ours[-LAST:]) / statistics.fmean(theirs[-LAST:]) - 1,
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
        name = run.home.name
        rounding = ["compute.micro_batch=4"] if name == "rounding" else []
        happened = train_disturbed(run, train_shards) if name == "disturbed" else train(run, train_shards, *rounding)
        evaluate(run, test_shards)
        write_json(record, happened)
    return {**json.loads(record.read_text()), "losses": run.metrics("loss")}


def markdown(curves: dict[str, dict[str, Any]]) -> str:
    """Largest relative difference of the loss from the undisturbed run's, up to some steps."""
    lines = [["largest difference up to step", *map(str, MARKS)], ["---"] * (len(MARKS) + 1)]
    lines += [[name, *(f"{x:.0e}" for x in curve["largest"].values())] for name, curve in curves.items()]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


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
    losses = {name: happened.pop("losses") for name, happened in made.items()}
    curves = {name: compare(losses[name], losses[NAMES[0]]) for name in NAMES[1:]}
    scores = comparison.collect([asked.runs / name for name in NAMES])
    ends = {name: statistics.fmean(curve[-LAST:]) for name, curve in losses.items()}
    content = {**scores, "happened": made, "curves": curves, "last_losses": ends}
    asked.out.write_text(json.dumps(content, indent=1) + "\n")
    print(markdown(curves), comparison.markdown(scores), json.dumps({"happened": made, "curves": curves}), sep="\n")


if __name__ == "__main__":
    main()
