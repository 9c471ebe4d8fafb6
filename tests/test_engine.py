"""The engine: the same training at every ZeRO stage, world size and chunk size, and state by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import Compute, Optimizer
from tests.standin import Contrast, Regress, VectorLoader, run_ranks


def train(
    stage: int,
    steps: int,
    micro_batch: int | None = None,
    separable: bool = False,
    batch_size: int = 16,
    name: str = "adamw",
    precision: str = "fp32",
) -> dict[str, Any]:
    """Losses, gradient norms, final weights and moments of a short training on this rank."""
    from pretrain import distributed
    from pretrain.engine import Engine
    from pretrain.microbatch import backward

    ranks = distributed.join(60)
    task = Regress() if separable else Contrast()
    compute = Compute(zero_stage=stage, precision=precision, compile=False)
    optimizer = Optimizer(name=name, lr=1e-2, weight_decay=0.1, clip=0.5)
    engine = Engine(task, compute, optimizer, ranks, None)
    loader = VectorLoader(batch_size=batch_size, rank=ranks.rank, world_size=ranks.world_size)
    losses, norms = [], []
    for step in range(steps):
        record = backward(engine, task, loader[step], micro_batch)
        result = engine.step(1e-2)
        assert not result.skipped
        losses.append(float(distributed.mean_over_ranks(record["loss"], ranks)))
        norms.append(float(result.grad_norm))
    weights = {n: t.clone() for n, t in engine.weights().items()}
    moments = {n: t.clone() for n, t in engine.moments().tensors.items()}
    return {"losses": losses, "norms": norms, "weights": weights, "moments": moments}


def plain(steps: int, separable: bool = False, batch_size: int = 16) -> dict[str, Any]:
    """The same training by torch alone: one process, whole batch, autograd, clip_grad_norm_, AdamW."""
    task = Regress() if separable else Contrast()
    decayed = [p for p in task.module.parameters() if p.ndim > 1]
    others = [p for p in task.module.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=1e-2
    )
    losses, norms = [], []
    for step in range(steps):
        batch = VectorLoader(batch_size=batch_size)[step]
        loss, _ = task.loss(task.embed(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(task.module.parameters(), 0.5)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return {"losses": losses, "norms": norms, "weights": dict(task.module.state_dict())}


def same(ours: dict[str, Any], reference: dict[str, Any]) -> None:
    assert ours["losses"] == pytest.approx(reference["losses"], rel=1e-5, abs=1e-6)
    assert ours["norms"] == pytest.approx(reference["norms"], rel=1e-4)
    for name, tensor in reference["weights"].items():
        torch.testing.assert_close(ours["weights"][name], tensor, rtol=1e-3, atol=2e-5, msg=name)


def train_stages(stages: tuple[int, ...], steps: int) -> dict[int, dict[str, Any]]:
    """One start of the processes for several engines: importing DeepSpeed takes longer than the training."""
    return {stage: train(stage, steps) for stage in stages}


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_stage_trains_as_plain_torch_does(world_size: int, tmp_path: Path) -> None:
    reference = plain(20)
    for results in run_ranks(world_size, train_stages, tmp_path, (0, 1, 2, 3), 20):
        for result in results.values():
            same(result, reference)
