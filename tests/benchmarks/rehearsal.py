"""The flagship rehearsed: configs/pretrain.yaml, smaller only in size, on real images, ended and resumed in the middle.

    python pretrain/make_shards.py imagenet IMAGENET data/imagenet --resize 320
    python tests/benchmarks/rehearsal.py data/imagenet/train [--runs runs] [--out rehearsal.json]

Trains through cluster/launch.py on two processes of this machine; SMALLER is all that differs from the file. In the
middle comes `cancel`, then `resume`; in the end timm loads the export. Written are the means of the loss at both ends
and around the resume, and the views per second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import timm
import torch

import pretrain  # noqa: F401  (registers the models)
from downstream.results import commit
from tests.benchmarks.launched import Run

STEPS, SIZE, WINDOW = 200, 96, 20
SMALLER = (
    "epochs=null", f"steps={STEPS}", "batch_size=32", "model.args.embed_dim=96", "model.args.num_heads=6",
    "model.args.depth=1", f"model.args.img_size={SIZE}", f"views.size={SIZE}", "schedule.warmup_epochs=0",
    "schedule.warmup_steps=10", "checkpoints.save_every=100", "loading.workers=1",
    "cluster.nodes=1", "cluster.processes=2", "cluster.gpus=0", "cluster.cpus_per_process=1", "downstream=[]",
)  # fmt: skip


def rehearse(run: Run, shards: str) -> None:
    """The whole training, with its interruption."""
    run.launch("pretrain.yaml", *SMALLER, f"data.shards={shards}")
    run.reach(STEPS // 2)
    run.cancel()
    run.resume()
    run.finish()


def loaded(export: Path) -> dict[str, Any]:
    """What timm makes of the export."""
    model: Any = timm.create_model(f"local-dir:{export}", pretrained=True).eval()
    with torch.no_grad():
        features = model.forward_features(torch.zeros(1, 3, SIZE, SIZE))
    return {"class": type(model).__name__, "features": list(features.shape)}


def summary(run: Run) -> dict[str, Any]:
    """Means over WINDOW steps and what happened."""
    losses, speed = run.metrics("loss"), run.metrics("views_per_s")
    assert len(losses) == STEPS
    saved = int(run.events("preempted")[0]["step"])
    return {
        "loss": {
            "first": statistics.fmean(losses[:WINDOW]),
            "before_resume": statistics.fmean(losses[saved - WINDOW : saved]),
            "after_resume": statistics.fmean(losses[saved : saved + WINDOW]),
            "last": statistics.fmean(losses[-WINDOW:]),
        },
        "ended_at": saved,
        "starts": [start["step"] for start in run.events("started")],
        "processes": [start["world_size"] for start in run.events("started")],
        "views_per_s": statistics.median(speed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("shards")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("rehearsal.json"))
    asked = parser.parse_args()
    run = Run(asked.runs, "rehearsal")
    rehearse(run, asked.shards)
    result = {**summary(run), "timm": loaded(run.home / "export"), "smaller": SMALLER, "commit": commit()}
    asked.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
