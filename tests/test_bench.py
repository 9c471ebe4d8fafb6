"""The benchmark: counts of FLOPs and bytes against closed forms, equal losses of ours and plain, the command itself."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loader_process import SIMCLR
from loader_sets import make_loader, write_set
from torch import Tensor, nn

from configs.errors import UserError
from configs.loader import load
from pretrain import bench, distributed, timing, workloads
from pretrain.data import bench as data_bench
from pretrain.tasks.nt_xent import nt_xent
from tests.plain.loss import nt_xent as full_nt_xent
from tests.plain.models import AKOrN as Plain

CPU = torch.device("cpu")


def test_flops_of_akorn_equal_the_closed_form() -> None:
    import timm

    import pretrain  # noqa: F401  (registers the models)

    model = timm.create_model("akorn_nano_patch4_32", num_classes=0)
    L, T, N, C, n, patch = 1, 8, 64, 128, 4, 4
    expected = L * T * (N * 8 * C**2 + 4 * N**2 * C) + L * N * 2 * n * C**2 + N * 2 * 3 * patch**2 * C
    assert timing.flops_per_view(model, torch.randn(1, 3, 32, 32), torch.randn(1, N, C)) == expected


def test_peak_bytes_counts_what_is_alive_at_once() -> None:
    def step(clock: timing.Clock) -> float:
        first = torch.ones(1 << 18)  # 1 MiB
        del first
        second = torch.ones(1 << 19)  # 2 MiB
        return float(second[0])

    assert 2 << 20 <= timing.peak_bytes(step, CPU) < 2.1 * 2**20


def test_rounds_are_interleaved_and_the_warm_up_is_left_out() -> None:
    order: list[str] = []

    def named(name: str) -> timing.Step:
        def step(clock: timing.Clock) -> float:
            order.append(name)
            clock.seconds["forward"] += 1.0 if len(order) > 2 else 100.0
            return 0.0

        return step

    measured = timing.interleaved({"a": named("a"), "b": named("b")}, CPU, rounds=2)
    assert order == ["a", "b"] * 3
    assert measured["a"].step_s == 1.0


def test_the_peak_is_measured_on_both_sides_of_a_step_and_outside_its_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([100.0, 300.0])
    monkeypatch.setattr(timing, "peak_flops", lambda device, dtype: next(found))

    def step(clock: timing.Clock) -> float:
        clock.seconds["forward"] += 1.0
        return 7.0

    peaks: list[float] = []
    clock = timing.Clock(CPU)
    assert timing.beside_peaks(step, CPU, torch.float32, peaks)(clock) == 7.0
    assert (peaks, sum(clock.seconds.values())) == ([200.0], 1.0)


def test_time_in_collectives_counts_once() -> None:
    clock = timing.Clock(CPU, dict.fromkeys(timing.PARTS, 0.0))
    with clock.part("loss"), clock.part("communication"):
        sum(range(100_000))
    assert clock.seconds["loss"] < clock.seconds["communication"]


def test_the_gather_of_the_loss_counts_as_communication(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is told of a second process, which holds the same embeddings."""
    monkeypatch.setattr("pretrain.tasks.nt_xent._world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.all_gather_single", lambda whole, part: whole.copy_(torch.cat([part, part])))
    clock = timing.Clock(CPU)
    with timing.timed_collectives(clock):
        nt_xent(torch.randn(4, 2, 8))
    assert clock.seconds["communication"] > 0


def losses_of(model: nn.Module, embed: object, loss: object, steps: int) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        images = torch.rand(16, 3, 16, 16, generator=generator)
        start = torch.randn(16, 16, 4, 4, 4, generator=generator)
        value = loss(embed(images, start))  # type: ignore[operator]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def test_twenty_steps_have_the_losses_of_the_published_way_of_working() -> None:
    """By the fastest kernels: in fp32 to 1e-4, in bf16 no further from fp32 than plain bf16 is."""
    from pretrain.models.reference import convert

    torch.manual_seed(0)
    arguments = {"n": 4, "ch": 64, "L": 1, "T": 4, "psize": 4, "imsize": 16, "J": "attn", "gta": True, "heads": 4}
    weights = Plain(**arguments).state_dict()

    def of_plain() -> list[float]:
        model = Plain(**arguments)
        model.load_state_dict(weights)

        def embed(images: Tensor, start: Tensor) -> Tensor:
            return model(images, start)["output"].float()

        return losses_of(model, embed, lambda z: full_nt_xent(*z.unflatten(0, (-1, 2)).unbind(1), 0.1), 20)

    def of_ours() -> list[float]:
        ours = convert(weights, arguments)
        workloads.kernels.fastest(ours.model)
        together = nn.ModuleList([ours.model.train(), ours.projector])

        def embed(images: Tensor, start: Tensor) -> Tensor:
            return ours.projector(ours.model((images - 0.5) / 0.5, start)).float()

        return losses_of(together, embed, lambda z: nt_xent(z.unflatten(0, (-1, 2)))[0], 20)

    expected = of_plain()
    assert max(abs(a - b) / b for a, b in zip(of_ours(), expected, strict=True)) < 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        rounded = [max(abs(a - b) for a, b in zip(losses(), expected)) for losses in (of_ours, of_plain)]
    assert rounded[0] < 1.5 * rounded[1]


@pytest.mark.slow
def test_command_prints_one_line_of_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    arguments = ["quickstart.yaml", "batch_size=4", "model.args.num_steps=1", "--rounds", "1", "--against", "plain"]
    assert bench.main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["ours"]["views_per_s"] > 0
    assert 0 < result["share_of_peak"] < 1
    assert 0 < result["peak_gflops"] <= result["best_peak_gflops"]
    assert result["times_faster"] > 0


def test_a_step_of_a_classifier_takes_one_view_and_a_label() -> None:
    small = ["model.name=resnet18", "model.args.channels=[4,4,4,4]", "batch_size=4"]
    ours = workloads.Ours(load("classify.yaml", small), distributed.join())
    loss = ours.step(timing.Clock(CPU))
    assert ours.num_views == 1
    assert 1 < loss < 6  # about ln 10
    with pytest.raises(UserError, match="--against plain is for task simclr"):
        bench.main(["classify.yaml", "--against", "plain"])


def test_flops_of_a_model_with_batch_norm_are_counted() -> None:
    config = load("cifar10.yaml", ["model.name=resnet10t", "batch_size=2", "compute.precision=fp32"])
    workload = workloads.Ours(config, distributed.join())
    assert workload.flops_per_view() > 1e6
    assert workload.task.module.training


@pytest.mark.parametrize("more", [["--rounds", "0"], ["--processes", "1,x"], ["--processes", "0"]])
def test_numbers_that_measure_nothing_are_refused(more: list[str]) -> None:
    with pytest.raises(UserError, match=more[0]):
        bench.main(["cifar10.yaml", *more])


def test_a_config_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bench measures pretraining"):
        bench.main(["object_discovery.yaml", "ckpt=x", "data=y"])


def test_compiling_the_colour_is_no_time_of_the_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = set()

    def compiled(self: Any, batch: Any) -> None:
        """Slow for each new size, as torch.compile is."""
        if len(batch) not in sizes:
            sizes.add(len(batch))
            time.sleep(1)

    monkeypatch.setattr(data_bench.Colour, "__call__", compiled)
    loader: Any = make_loader(write_set(tmp_path / "set"))
    config: Any = SimpleNamespace(data=SimpleNamespace(max_pixels=10**6), seed=0)
    took = data_bench.stages(config, loader, SIMCLR, 0.05)
    assert took["device"] * data_bench.CHUNK < 0.5
    assert all(seconds > 0 for seconds in took.values())
