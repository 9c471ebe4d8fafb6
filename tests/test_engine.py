"""The engine: the same training at every ZeRO stage, world size and chunk size as torch alone, and state by name.

One start of the processes serves several engines: importing DeepSpeed takes longer than these trainings.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.schema import Compute, Optimizer
from configs.schema import Ema as EmaConfig
from tests.standin import Contrast, Regress, VectorLoader, run_ranks

STEPS = 50
RATE = 1e-2


def build(stage: int, *, separable: bool = False, moments: Any = None, weights: Any = None, **compute: Any) -> Any:
    """(task, engine, loader) of this rank."""
    from pretrain import distributed
    from pretrain.engine import Engine

    ranks = distributed.join(60)
    task = Regress() if separable else Contrast()
    if weights is not None:
        task.module.load_state_dict(weights)
    settings = Compute(**{"zero_stage": stage, "precision": "fp32", "compile": False, **compute})
    engine = Engine(task, settings, Optimizer(lr=RATE, weight_decay=0.1, clip=0.5), ranks, moments)
    return task, engine, VectorLoader(rank=ranks.rank, world_size=ranks.world_size)


def train(stage: int, steps: int = STEPS, micro_batch: int | None = None, *, separable: bool = False) -> dict[str, Any]:
    """Losses, gradient norms and final weights of a short training on this rank."""
    from pretrain.distributed import mean_over_ranks
    from pretrain.microbatch import backward

    task, engine, loader = build(stage, separable=separable)
    losses, norms = [], []
    for step in range(steps):
        record = backward(engine, task, loader[step], micro_batch)
        result = engine.step(RATE)
        assert not result.skipped
        losses.append(float(mean_over_ranks(record["loss"], engine.ranks)))
        norms.append(float(result.grad_norm))
    return {"losses": losses, "norms": norms, "weights": copied(engine.weights())}


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def plain(*, separable: bool = False) -> dict[str, Any]:
    """The same training by torch alone: one process, whole batch, autograd, clip_grad_norm_, AdamW."""
    task = Regress() if separable else Contrast()
    decayed = [p for p in task.module.parameters() if p.ndim > 1]
    others = [p for p in task.module.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    losses, norms = [], []
    for step in range(STEPS):
        batch = VectorLoader()[step]
        loss, _ = task.loss(task.embed(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(task.module.parameters(), 0.5)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return {"losses": losses, "norms": norms, "weights": dict(task.module.state_dict())}


def same(ours: dict[str, Any], reference: dict[str, Any]) -> None:
    assert ours["losses"] == pytest.approx(reference["losses"], rel=1e-5, abs=1e-6)
    assert ours["norms"][0] == pytest.approx(reference["norms"][0], rel=1e-5)
    assert ours["norms"][:20] == pytest.approx(reference["norms"][:20], rel=1e-4)
    assert ours["norms"] == pytest.approx(reference["norms"], rel=1e-3)
    for name, tensor in reference["weights"].items():
        torch.testing.assert_close(ours["weights"][name], tensor, rtol=1e-3, atol=2e-5, msg=name)


def matrix() -> dict[tuple[int, int | None, bool], dict[str, Any]]:
    """Every stage, with and without chunks, both kinds of tasks."""
    cases = [(stage, chunk, False) for stage in range(4) for chunk in (None, 3)] + [(0, 3, True), (3, None, True)]
    return {case: train(case[0], STEPS, case[1], separable=case[2]) for case in cases}


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_stage_and_chunk_size_trains_as_plain_torch_does(world_size: int, tmp_path: Path) -> None:
    references = {False: plain(), True: plain(separable=True)}
    for results in run_ranks(world_size, matrix, tmp_path):
        for (stage, chunk, separable), result in results.items():
            assert result["losses"], (stage, chunk)
            same(result, references[separable])


def states_by_name() -> None:
    """On each rank: state leaves one stage and enters another unchanged; bad steps change nothing; EMA at stage 3."""
    first = _trained(0, None)
    for stage in (1, 2, 3, 0):
        second = _trained(stage, first)
        assert second["moments"].step == first["moments"].step + 3
        first = second
    for stage in range(4):
        _bad_step_changes_nothing(stage)
    _average_in_parts()


def _trained(stage: int, before: dict[str, Any] | None) -> dict[str, Any]:
    """Three steps on from the state of another engine, which must come out as it went in."""
    from pretrain.microbatch import backward

    start = {} if before is None else before
    task, engine, loader = build(stage, **start)
    if before is not None:
        found = engine.moments()
        assert found.step == before["moments"].step
        assert found.tensors.keys() == before["moments"].tensors.keys()
        assert all(torch.equal(t, before["moments"].tensors[name]) for name, t in found.tensors.items())
        assert all(torch.equal(t, before["weights"][name]) for name, t in engine.weights().items())
    for step in range(3):
        backward(engine, task, loader[step], None)
        engine.step(RATE)
    from pretrain.engine import Moments

    moments = engine.moments()
    assert all(t.abs().sum() > 0 for t in moments.tensors.values())
    return {"moments": Moments(copied(moments.tensors), moments.step), "weights": copied(engine.weights())}


def _bad_step_changes_nothing(stage: int) -> None:
    """A NaN on the last rank only: every rank skips."""
    from pretrain.microbatch import backward

    task, engine, loader = build(stage)
    for step in range(2):
        backward(engine, task, loader[step], None)
        engine.step(RATE)
    weights, moments = copied(engine.weights()), copied(engine.moments().tensors)
    for micro_batch in (None, 3):
        batch = loader[2]
        if engine.ranks.rank == engine.ranks.world_size - 1:
            batch.tensors["images"][1] = torch.nan
        backward(engine, task, batch, micro_batch)
        assert engine.step(RATE).skipped, (stage, micro_batch)
        assert all(torch.equal(t, weights[name]) for name, t in engine.weights().items())
        assert all(torch.equal(t, moments[name]) for name, t in engine.moments().tensors.items())
    backward(engine, task, loader[3], None)
    assert not engine.step(RATE).skipped
    assert all(torch.isfinite(t).all() for t in engine.weights().values())


def _average_in_parts() -> None:
    from pretrain.ema import Ema
    from pretrain.microbatch import backward

    averages = {}
    for stage in (0, 3):
        task, engine, loader = build(stage)
        ema = Ema(engine, EmaConfig(decay=0.6, every=1, start=0), 10)
        for step in range(1, 6):
            backward(engine, task, loader[step], None)
            engine.step(RATE)
            ema.update(step)
            if step == 3:
                whole = copied(ema.weights())
                ema = Ema(engine, EmaConfig(decay=0.6, every=1, start=0), 10)
                ema.load(whole, 3)
        averages[stage] = copied(ema.weights())
    for name, tensor in averages[0].items():
        torch.testing.assert_close(averages[3][name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("world_size", [1, 3])  # three divide the sizes of few parameters
def test_state_goes_by_name_from_stage_to_stage_and_bad_steps_change_nothing(world_size: int, tmp_path: Path) -> None:
    run_ranks(world_size, states_by_name, tmp_path)


def largest_allocations() -> dict[int, int]:
    """Most elements that are allocated at once in a step, by stage."""
    from pretrain.microbatch import backward

    most, real = {}, torch.empty
    for stage in (1, 2, 3):
        seen: list[int] = []

        def spying(*size: Any, seen: list[int] = seen, **options: Any) -> Tensor:
            tensor: Tensor = real(*size, **options)
            seen.append(tensor.numel())
            return tensor

        torch.empty = spying  # type: ignore[assignment]
        try:
            task, engine, loader = build(stage)
            backward(engine, task, loader[0], None)
            engine.step(RATE)
        finally:
            torch.empty = real
        most[stage] = max(seen)
    return most


def test_buffers_of_zero_are_small_beside_a_gpu(tmp_path: Path) -> None:
    (most,) = run_ranks(1, largest_allocations, tmp_path)
    assert all(0 < 4 * elements < 2**28 for elements in most.values()), most


def waits() -> int:
    """How often DeepSpeed has the host wait for the device in five steps of two chunks, at stage 0."""
    from deepspeed.accelerator import get_accelerator

    from pretrain.microbatch import backward

    task, engine, loader = build(0)
    accelerator, count = type(get_accelerator()), 0
    real = accelerator.synchronize

    def counted(self: Any, device: Any = None) -> None:
        nonlocal count
        count += 1

    accelerator.synchronize = counted
    try:
        for step in range(5):
            backward(engine, task, loader[step], 4)
            engine.step(RATE)
    finally:
        accelerator.synchronize = real
    return count


def test_a_step_never_waits_for_the_device(tmp_path: Path) -> None:
    """CUDA's own check (test_gpu.py) does not see torch.cuda.synchronize."""
    assert run_ranks(1, waits, tmp_path) == [0]


@pytest.mark.parametrize("norm", [2.0, torch.tensor(2.0)])
def test_figures_of_a_step_lie_on_the_device(norm: Any) -> None:
    """With the loss, beside which they are stacked; DeepSpeed returns numbers where it skips a step."""
    from pretrain.distributed import Ranks
    from pretrain.engine import Engine

    engine = object.__new__(Engine)
    engine.stage, engine.ranks = 2, Ranks(0, 1, 0, torch.device("meta"))
    engine._deepspeed = SimpleNamespace(
        step=lambda: None,
        get_global_grad_norm=lambda: norm,
        optimizer=SimpleNamespace(param_groups=[], overflow=False),
    )
    result = engine.step(RATE)
    assert result.grad_norm.is_meta
    assert result.skipped.is_meta


def in_bf16() -> dict[str, Any]:
    """Weights stay fp32, products are bf16, the loss stays close to that in fp32."""
    from pretrain.microbatch import backward

    losses = {}
    for precision in ("fp32", "bf16"):
        task, engine, loader = build(0, precision=precision)
        with torch.no_grad():
            dtype = engine.embed(loader[0]).dtype
        for step in range(5):
            record = backward(engine, task, loader[step], 4)
            engine.step(RATE)
        losses[precision] = float(record["loss"])
        assert all(t.dtype == torch.float32 for t in engine.weights().values())
        assert dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    return losses


def test_bf16_is_autocast_over_fp32_parameters(tmp_path: Path) -> None:
    (losses,) = run_ranks(1, in_bf16, tmp_path)
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)
    assert losses["bf16"] != losses["fp32"]
