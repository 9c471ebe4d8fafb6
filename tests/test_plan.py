"""The plan in numbers, and the memory estimate against the models themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster import memory
from cluster.plan import count_samples, plan_of
from cluster.resources import Resources
from configs import PretrainConfig, UserError
from configs.cluster import Cluster


def config(**changes: object) -> PretrainConfig:
    base = {
        "name": "r",
        "batch_size": 64,
        "epochs": 2.0,
        "model": {"name": "akorn_base_patch16_256"},
        "data": {"shards": "nowhere"},
        "views": {"size": 256},
    }
    return PretrainConfig.model_validate_json(json.dumps({**base, **changes}))


def resources(nodes: int, processes: int, gpus: int = 0) -> Resources:
    return Resources("slurm", nodes, processes, gpus, 1, Cluster())


def test_the_batch_is_dealt_to_all_processes(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text('{"samples": 1000}')
    made = plan_of(config(data={"shards": str(tmp_path)}, compute={"micro_batch": 3}), resources(2, 4))
    assert (made.world_size, made.batch_per_process, made.micro_batches) == (8, 8, 3)
    assert made.steps == 32  # 2 * 1000 / 64 = 31.25, in whole batches
    assert count_samples(str(tmp_path / "none")) is None
    assert plan_of(config(), resources(2, 4)).steps is None


@pytest.mark.parametrize(
    ("epochs", "samples", "expected"), [(1.0, 64, 4), (1.0, 65, 5), (2.5, 64, 10), (0.01, 64, 1), (1.1, 1600, 110)]
)
def test_epochs_are_rounded_up_to_whole_batches(epochs: float, samples: int, expected: int, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(json.dumps({"samples": samples}))
    made = config(epochs=epochs, batch_size=16, data={"shards": str(tmp_path)})
    assert plan_of(made, resources(1, 1)).steps == made.num_steps(samples) == expected


def test_a_batch_that_does_not_divide_names_what_does() -> None:
    with pytest.raises(UserError, match=r"over 6 processes; use .*4, 8.* processes, or batch_size=60"):
        plan_of(config(), resources(1, 6))


@pytest.mark.parametrize(
    "name",
    ["akorn_tiny_patch16_256", "akorn_small_patch8_256", "akorn_base_patch16_256", "akorn_large_patch16_256",
     "akorn_clevrtex_l2_patch8_128", "akorn_clevrtex_large_patch8_128", "akorn_nano_patch4_32",
     "akorn_nano_l2_patch4_32"],
)  # fmt: skip
def test_estimated_parameters_are_near_those_of_the_model(name: str) -> None:
    import timm
    import torch

    import pretrain  # noqa: F401  (registers the models)

    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    truth = sum(parameter.numel() for parameter in model.parameters())
    estimate = memory.parameters(config(model={"name": name}))
    assert estimate is not None
    assert 0.6 < estimate / truth < 1.7


def test_the_estimate_grows_with_what_costs_memory() -> None:
    here = resources(1, 1, 1)

    def need(**changes: object) -> float:
        made = config(**changes)
        estimate = memory.estimate_gib(made, plan_of(made, here), here)
        assert estimate is not None
        return estimate

    assert need(compute={"micro_batch": 8}) < need() / 4
    assert need(compute={"recompute": True}) < need() / 4
    assert need(views={"size": 128}) < need() / 3
    other = config(model={"name": "resnet50"})
    assert memory.estimate_gib(other, plan_of(other, here), here) is None
