"""Paths become absolute at submission, in every job; names, URLs and pipes stay what they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import locate
from cluster.locate import located
from configs import AnyJob, LinearProbeConfig, PretrainConfig
from configs.jobs import ObjectDiscoveryConfig, RobustnessConfig, SudokuConfig
from configs.section import Section

# Text that is no path. A new key of the schemas must be named here or in locate.py.
NO_PATHS = {
    *("account", "constraint", "exclude", "gpu_type", "interface", "partition", "qos"),
    *("env", "sbatch_args", "setup", "srun_args"),
    *("arch", "args", "device", "layer", "name", "parts", "puzzle", "wandb"),
    *("corruptions", "key_pattern", "objects_preset", "preset", "segmentation"),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    return tmp_path


def sections(base: type[Section] = Section) -> Iterator[type[Section]]:
    for kind in base.__subclasses__():
        if kind.__module__.startswith("configs."):
            yield kind
            yield from sections(kind)


def test_every_key_that_holds_text_is_a_path_or_is_none() -> None:
    text = {key for kind in sections() for key, field in kind.model_fields.items() if "str" in str(field.annotation)}
    assert text == NO_PATHS | locate._PATHS | locate._MAYBE_PATHS


def paths_of(config: AnyJob) -> dict[str, object]:
    there = located(config)
    return {key: value for key, value in there if value != getattr(config, key)}


def test_paths_of_every_evaluation(here: Path) -> None:
    base = {"data": f"{here}/d", "runs_dir": f"{here}/runs"}
    assert paths_of(SudokuConfig(data="d", ckpt="weights", out="o")) == base | {
        "ckpt": f"{here}/weights",
        "out": f"{here}/o",
    }
    assert paths_of(LinearProbeConfig(data="d", train="t", cache_dir="c", segmentation="voc")) == base | {
        "train": f"{here}/t",
        "cache_dir": f"{here}/c",
    }
    assert paths_of(RobustnessConfig(data="d", cifar10c="c", transfer_from="weights")) == base | {
        "cifar10c": f"{here}/c",
        "transfer_from": f"{here}/weights",
    }
    assert paths_of(ObjectDiscoveryConfig(data="d", also=("weights", "resnet50"))) == base | {
        "also": (f"{here}/weights", "resnet50")
    }


def test_paths_of_a_run_and_its_chain(here: Path) -> None:
    config = PretrainConfig.model_validate_json(
        json.dumps(
            {
                "name": "r",
                "batch_size": 64,
                "steps": 2,
                "model": {"name": "akorn_base_patch16_256"},
                "data": {"shards": ["a", "s3://b/c", "pipe:cat d"]},
                "views": {"size": 256},
                "observers": {"knn_train": "k"},
                "downstream": [{"job": "linear_probe", "data": "e"}],
            }
        )
    )
    there = located(config)
    assert isinstance(there, PretrainConfig)
    assert there.data.shards == (f"{here}/a", "s3://b/c", "pipe:cat d")
    assert there.runs_dir == f"{here}/runs"
    assert there.observers.knn_train == f"{here}/k"
    assert there.downstream[0].data == f"{here}/e"
    assert there.model.name == "akorn_base_patch16_256"


@pytest.mark.parametrize("name", ["resnet50", "hf-hub:timm/resnet50.a1_in1k", "https://x/y.pth", "file:///data/a.tar"])
def test_names_and_urls_stay(here: Path, name: str) -> None:
    assert locate.absolute(name) == name or name == "resnet50"
    assert getattr(located(LinearProbeConfig(ckpt=name)), "ckpt", None) == name


def test_prefixes_and_the_home_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    assert locate.absolute("file:a/b-{0..3}.tar") == f"file:{here}/a/b-{{0..3}}.tar"
    assert getattr(located(LinearProbeConfig(ckpt="local-dir:x")), "ckpt", None) == f"local-dir:{here}/x"
    assert getattr(located(LinearProbeConfig(ckpt="~/weights")), "ckpt", None) == f"{here}/weights"
