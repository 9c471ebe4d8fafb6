"""What runs on a GPU equals what runs on the CPU, and a training step never waits for the device."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from configs.schema import Compute, Optimizer, PretrainConfig, Views
from pretrain import distributed
from pretrain.data import colour, counter, crop, views
from pretrain.data.batch import Batch
from pretrain.distributed import Ranks
from pretrain.models.akorn import AKOrN

ROOT = Path(__file__).resolve().parents[1]
GPU = torch.device("cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]


def small(kernel: str, **arguments: Any) -> nn.Module:
    """An AKOrN of two blocks with weights that are the same at every call."""
    torch.manual_seed(0)
    model = AKOrN(
        img_size=32, patch_size=4, embed_dim=64, depth=2, num_heads=4, num_steps=4, num_classes=0, **arguments
    )
    for block in model.blocks:
        block.kuramoto.kernel = kernel
    return model


def outputs_and_gradients(model: nn.Module, device: torch.device) -> list[Tensor]:
    """Of the fourth of four steps on as many batches: a CUDA graph is recorded at the second."""
    model.to(device).train()
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        model.zero_grad()
        images = torch.randn(6, 3, 32, 32, generator=generator).to(device)
        start = torch.randn(6, *model.start_shape(32), generator=generator).to(device)  # type: ignore[operator]
        output = model(images, start)
        output.square().mean().backward()
    return [output.detach().cpu(), *(p.grad.cpu() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kernel", ["plain", "compiled", "graphed"])
@pytest.mark.parametrize("coupling", ["attn", "conv"])
def test_models_equal_the_cpus(coupling: str, kernel: str) -> None:
    expected = outputs_and_gradients(small("plain", coupling=coupling), torch.device("cpu"))
    with torch.backends.cudnn.flags(allow_tf32=False):
        result = outputs_and_gradients(small(kernel, coupling=coupling), GPU)
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


def test_colour_equals_the_cpus() -> None:
    section = Views(size=20, flip=0.5, jitter=(0.8, 0.8, 0.8, 0.5), jitter_p=0.8, grey_p=0.2, blur_p=0.5)
    images = torch.randint(0, 256, (80, 3, 20, 20), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    params = views.colour_params(section, 0, 0, np.arange(80), 0)
    augment = colour.Colour(section, (0.5,) * 3, (0.5,) * 3)
    with torch.backends.cudnn.flags(allow_tf32=False):
        ours = augment.apply(images.to(GPU), params)
    torch.testing.assert_close(ours.cpu(), augment.apply(images, params), atol=1e-4, rtol=0)


def test_initial_oscillators_equal_the_cpus() -> None:
    keys = torch.from_numpy(counter.key(0, 1, np.arange(50), 0, "start").view(np.int64))
    for shape in ((64, 32), (7, 3)):
        ours = counter.normal(keys.to(GPU), shape)
        torch.testing.assert_close(ours.cpu(), counter.normal(keys, shape), atol=1e-5, rtol=1e-5)


def test_crops_of_images_kept_on_the_gpu_equal_the_cpus() -> None:
    images = torch.randint(0, 256, (4, 3, 30, 40), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    boxes = torch.tensor([[0, 0, 30, 40], [3, 5, 20, 20], [10, 0, 7, 33], [1, 1, 28, 8]])
    ours = crop.resized_batch(images.to(GPU), boxes.to(GPU), 16).cpu()
    assert (ours.int() - crop.resized_batch(images, boxes, 16).int()).abs().max() <= 1


def config_of(**changes: Any) -> PretrainConfig:
    values = {
        "name": "gpu", "batch_size": 16, "steps": 8, "views": {"size": 32}, "data": {"shards": "none"},
        "model": {"name": "akorn_nano_patch4_32"}, "compute": {"precision": "bf16"}, **changes,
    }  # fmt: skip
    return PretrainConfig.model_validate_json(json.dumps(values))


@contextlib.contextmanager
def syncs_forbidden() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")  # which lets torch.cuda.synchronize pass
    try:
        with mock.patch.object(torch.cuda, "synchronize", side_effect=AssertionError("the host waits for the device")):
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """One process group for all tests: DeepSpeed keeps hold of the first."""
    yield distributed.join(60)
    distributed.leave()


@pytest.mark.parametrize(("kernel", "micro_batch"), [("compiled", 8), ("graphed", None)])
def test_a_step_waits_for_nothing(ranks: Ranks, kernel: str, micro_batch: int | None) -> None:
    from pretrain import kernels
    from pretrain.engine import Engine
    from pretrain.microbatch import backward
    from pretrain.tasks import make_task

    config = config_of()
    task: Any = make_task(config)
    task.module.to(GPU).train()
    kernels.apply(task.backbone, [{"layer": kernels.shape_of(layer, (8, 8)), "kernel": kernel}
                                  for layer in kernels.layers_of(task.backbone)])  # fmt: skip
    engine = Engine(task, Compute(precision="bf16"), Optimizer(clip=1.0), ranks, None)
    images = torch.randint(0, 256, (16, 2, 3, 32, 32), dtype=torch.uint8, device=GPU)
    places = torch.arange(16)

    def step() -> None:
        batch = Batch({"images": images}, samples=places, epochs=places * 0, positions=places, seed=0)
        backward(engine, task, batch, micro_batch)
        engine.step(1e-3)

    for _ in range(4):
        step()
    with syncs_forbidden():
        step()


def launched(folder: Path, *overrides: str, gpu: bool) -> list[dict[str, Any]]:
    """Rows of metrics of a run of the quick start by the launcher."""
    environment = {**os.environ, **({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})}
    known = [f"data.shards={folder / 'data'}", f"runs_dir={folder / 'runs'}", "batch_size=16", "downstream=[]"]
    command = [sys.executable, str(ROOT / "cluster" / "launch.py"), "quickstart.yaml", *known, *overrides]
    subprocess.run(command, check=True, env=environment, cwd=folder)
    (run,) = (folder / "runs").iterdir()
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_begun_on_the_cpu_goes_on_on_the_gpu(tmp_path: Path) -> None:
    make = [sys.executable, str(ROOT / "pretrain" / "make_shards.py"), "tetrominoes", str(tmp_path / "data")]
    subprocess.run([*make, "--count", "64"], check=True)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").symlink_to(tmp_path / "data")
    whole = launched(tmp_path / "a", "steps=6", "compute.precision=fp32", gpu=False)
    launched(tmp_path / "b", "steps=3", "compute.precision=fp32", gpu=False)
    resume = [
        sys.executable,
        str(ROOT / "cluster" / "launch.py"),
        "resume",
        str(tmp_path / "b" / "runs" / "quickstart"),
    ]
    subprocess.run([*resume, "steps=6"], check=True, cwd=tmp_path / "b")
    rows = [json.loads(line) for line in (tmp_path / "b/runs/quickstart/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [row["step"] for row in whole]
    np.testing.assert_allclose([row["loss"] for row in rows], [row["loss"] for row in whole], rtol=1e-3)


def test_neighbours_by_faiss_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import faiss

    from downstream import neighbours

    monkeypatch.setattr(neighbours, "LEAST_ON_GPU", 0)
    if not faiss.get_num_gpus():
        pytest.skip("this faiss sees no GPU")
    generator = torch.Generator().manual_seed(0)
    base, queries = (torch.randn(count, 16, generator=generator) for count in (500, 20))
    similarity, _ = neighbours.nearest(base, queries, 5)
    expected = torch.nn.functional.normalize(queries) @ torch.nn.functional.normalize(base).T
    torch.testing.assert_close(similarity, expected.topk(5).values, atol=1e-4, rtol=0)
