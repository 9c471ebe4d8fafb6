"""Typing errors in models of timm's are refused by the launcher; models of ours cost no question."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster import foreign, launch
from configs import UserError, load
from pretrain.data.shards import ShardWriter

RUN = "name: r\nbatch_size: 8\nsteps: 3\nmodel:\n  name: resnet5O\ndata: {shards: nowhere}\nviews: {size: 32}\n"


def test_a_wrong_name_is_refused_at_the_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(RUN)
    with pytest.raises(UserError, match=r"^run\.yaml:4: model: no model named 'resnet5O'; did you mean 'resnet50'\?$"):
        launch.main(["run.yaml", "--dry-run"])
    load("run.yaml")  # status and the like ask nobody


@pytest.mark.parametrize(
    ("name", "arguments", "found"),
    [
        ("resnet18", {}, ""),
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 4}, ""),
        ("resnet18", {"drop_rat": 0.1}, "resnet18 takes no argument 'drop_rat'; did you mean 'drop_rate'?"),
        ("vit_tiny_patch16_224", {"embed_dim": 100}, "vit_tiny_patch16_224 with args {'embed_dim': 100}: dim should"),
        ("resnet18.a1_in2k", {}, "resnet18.a1_in2k with args {}: Invalid pretrained tag (a1_in2k)"),
    ],
)
def test_what_timm_says(name: str, arguments: dict[str, object], found: str) -> None:
    assert foreign.complaint(name, arguments).startswith(found)
    assert bool(foreign.complaint(name, arguments)) == bool(found)


def test_models_of_ours_are_known_without_asking(tmp_path: Path) -> None:
    def ask(name: str, arguments: dict[str, object]) -> None:
        raise AssertionError(name)

    (tmp_path / "run.yaml").write_text(RUN)
    load(tmp_path / "run.yaml", ["model.name=akorn_nano_patch4_32"], foreign=ask)
    load("sudoku.yaml", foreign=ask)
    with pytest.raises(UserError, match="sudoku_akorn takes no argument 'num_step'; did you mean 'num_steps'"):
        load("sudoku.yaml", ["model.args={num_step: 3}"])


@pytest.mark.parametrize(
    ("name", "arguments", "found"),
    [
        ("resnet18", {}, True),
        ("vit_tiny_patch16_224", {"img_size": 32}, False),
        ("akorn_classifier_32", {}, True),
        ("akorn_classifier_32", {"batch_norm": False}, False),
        ("akorn_nano_patch4_32", {}, False),
        ("hf-hub:some/model", {}, False),
    ],
)
def test_models_with_batch_norm_are_known(name: str, arguments: dict[str, object], found: bool) -> None:
    assert foreign.has_batch_norm(name, arguments) == found


@pytest.mark.parametrize("changes", [["cluster.processes=2"], ["compute.micro_batch=2"]])
def test_batch_norm_is_refused_at_the_prompt_where_it_would_be_inexact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("shards").mkdir()
    with ShardWriter(tmp_path / "shards" / "a-000000.tar") as writer:
        writer.write("0", {"txt": b"nothing"})
    Path("run.yaml").write_text(RUN.replace("resnet5O", "akorn_classifier_32").replace("nowhere", "shards"))
    values = ["cluster.executor=local", "cluster.gpus=0", "task={name: classify, num_classes: 10}", *changes]
    with pytest.raises(UserError, match=r"akorn_classifier_32 has BatchNorm.*\n.*model\.args\.batch_norm=false"):
        launch.main(["run.yaml", "--dry-run", *values])
    assert launch.main(["run.yaml", "--dry-run", *values, "model.args.batch_norm=false"]) == 0
