"""Our implementation against the plain transcription over a training: same weights, batches, initial oscillators.

    python tests/benchmarks/agreement.py TRAIN_SHARDS TEST_SHARDS [--steps 300] [--batch 32] [--out agreement.json]

Both take every step in turn, in fp32 with the same Adam, on what the loader gives for configs/quickstart.yaml. Beside
them runs the plain one once more, its weights changed by a relative 1e-7 at first: how fast it leaves its twin is how
fast rounding alone is amplified. Written are the loss curves, where they part, seconds per step, and the object
discovery of both backbones afterwards.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from configs import ObjectDiscoveryConfig, PretrainConfig, load
from downstream import object_discovery
from downstream.results import commit, write_json
from pretrain import kernels
from pretrain.data.batch import Batch
from pretrain.data.loader import Loader
from pretrain.models.reference import convert
from pretrain.tasks.nt_xent import nt_xent
from pretrain.tasks.simclr import Simclr
from tests.plain.loss import nt_xent as full_nt_xent
from tests.plain.models import AKOrN as Plain

ARGUMENTS: dict[str, Any] = {
    "n": 4, "ch": 128, "L": 1, "T": 8, "psize": 4, "imsize": 32, "J": "attn", "gta": True, "heads": 8, "c_norm": "none"
}  # fmt: skip
MODEL, PUBLISHED_STEP = "akorn_nano_patch4_32", {"gamma": 1.0, "self_drift": True}
GRID, OSCILLATORS = 8, 32
RATE, NUDGE = 1e-3, 1e-7
MARKS = (5, 10, 20, 50, 100, 200, 300, 500, 1000)

Loss = Callable[[Tensor, Tensor], Tensor]  # images [2b, 3, S, S] of mean 0, start [2b, N, C] -> loss


def plain_loss(model: nn.Module, temperature: float) -> Loss:
    def loss(images: Tensor, start: Tensor) -> Tensor:
        components = start.view(-1, GRID, GRID, ARGUMENTS["n"], OSCILLATORS).permute(0, 4, 3, 1, 2)
        embeddings = model(images * 0.5 + 0.5, components.contiguous())["output"].unflatten(0, (-1, 2))
        return full_nt_xent(embeddings[:, 0], embeddings[:, 1], temperature)

    return loss


def our_loss(model: nn.Module, projector: nn.Module, temperature: float) -> Loss:
    def loss(images: Tensor, start: Tensor) -> Tensor:
        return nt_xent(projector(model(images, start)).unflatten(0, (-1, 2)), temperature=temperature)[0]

    return loss


def inputs(task: Simclr, batch: Batch) -> tuple[Tensor, Tensor]:
    """Images and starts as the task hands them to its module."""
    seen: list[Tensor] = []
    hook = task.module.register_forward_pre_hook(lambda _, given: seen.extend(given))
    with torch.no_grad():
        task.embed(batch)
    hook.remove()
    return seen[0], seen[1]


def train(losses: dict[str, Loss], modules: dict[str, nn.Module], config: PretrainConfig, steps: int) -> dict[str, Any]:
    """Curves and seconds of both, stepping in turn."""
    task = Simclr(config)
    task.module = _Silent()
    optimizers = {name: torch.optim.Adam(module.parameters(), RATE) for name, module in modules.items()}
    curves: dict[str, list[float]] = {name: [] for name in modules}
    seconds: dict[str, list[float]] = {name: [] for name in modules}
    loader = Loader(config.data, config.loading, task.transform, seed=config.seed, batch_size=config.batch_size)
    for step in range(steps):
        given = inputs(task, loader[step])
        for name in list(modules)[:: 1 if step % 2 else -1]:
            began = time.perf_counter()
            loss = losses[name](*given)
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            seconds[name].append(time.perf_counter() - began)
            curves[name].append(loss.item())
        if step % 10 == 9:
            print(f"step {step + 1}: " + ", ".join(f"{n} {c[-1]:.6f}" for n, c in curves.items()), flush=True)
    loader.close()
    return {"losses": curves, "seconds": {name: statistics.median(values) for name, values in seconds.items()}}


def nudged(model: nn.Module) -> nn.Module:
    """A copy whose weights differ by rounding."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + NUDGE * torch.randn_like(parameter))
    return other


class _Silent(nn.Module):
    """In place of the task's network, whose inputs are wanted and not its embeddings."""

    def forward(self, images: Tensor, start: Tensor) -> Tensor:
        return images[:, :, 0, 0]


def score(model: nn.Module, scenes: str) -> dict[str, float]:
    """FG-ARI and MBO of a backbone by the protocol of Tetrominoes."""
    known = timm.create_model(MODEL, num_classes=0, **PUBLISHED_STEP)
    known.load_state_dict(model.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        save_for_hf(known, folder, safe_serialization=True, model_args=PUBLISHED_STEP)
        asked = {
            "ckpt": folder, "data": scenes, "preset": "tetrominoes", "controls": [], "baselines": [], "pictures": 0,
            "out": f"{folder}/scores",
        }  # fmt: skip
        found = object_discovery.run(ObjectDiscoveryConfig.model_validate_json(json.dumps(asked)))["models"][0]
    return {"fg_ari": found["scores"]["fg_ari"]["mean"], "mbo_i": found["scores"]["mbo_i"]["mean"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32, help="images; two views of each")
    parser.add_argument("--out", type=Path, default=Path("agreement.json"))
    asked = parser.parse_args()
    overrides = [f"data.shards={asked.train}", f"batch_size={asked.batch}", "compute.precision=fp32"]
    config = load("quickstart.yaml", overrides)
    assert isinstance(config, PretrainConfig)
    temperature = config.task.temperature  # type: ignore[union-attr]
    torch.manual_seed(config.seed)
    plain = Plain(**ARGUMENTS)
    ours = convert(plain.state_dict(), ARGUMENTS)
    assert ours.projector is not None
    kernels.fastest(ours.model)
    twin = nudged(plain)
    modules = {"ours": nn.ModuleList([ours.model.train(), ours.projector]), "plain": plain, "nudged": twin}
    losses = {
        "ours": our_loss(ours.model, ours.projector, temperature),
        "plain": plain_loss(plain, temperature),
        "nudged": plain_loss(twin, temperature),
    }
    result = train(losses, modules, config, asked.steps)
    for name in ("ours", "nudged"):
        apart = [abs(a - b) / b for a, b in zip(result["losses"][name], result["losses"]["plain"], strict=True)]
        result[f"largest_difference_{name}"] = {str(mark): max(apart[:mark]) for mark in MARKS if mark <= asked.steps}
    after = convert(plain.state_dict(), ARGUMENTS).model
    result["scores"] = {"ours": score(ours.model.eval(), asked.test), "plain": score(after, asked.test)}
    write_json(asked.out, {**result, "steps": asked.steps, "batch": asked.batch, "commit": commit()})
    print({key: value for key, value in result.items() if key != "losses"})


if __name__ == "__main__":
    main()
