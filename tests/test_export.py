"""Exports: what timm loads in a fresh process is bitwise the averaged backbone, and what is not is noticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import UserError
from pretrain import checkpoint, export, fingerprint
from pretrain.checkpoint import Snapshot
from pretrain.tasks import make_task
from tests.standin_run import settings

ROOT = Path(__file__).resolve().parents[1]
LOAD = """
import sys, torch, pretrain, timm
from pretrain import fingerprint
model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()
torch.save(model(fingerprint.fixed_input([2, 3, 32, 32])), sys.argv[2])
"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small AKOrN with one checkpoint: weights, and an average that differs from them."""
    folder = tmp_path_factory.mktemp("run")
    config = settings(model={"name": "akorn_nano_patch4_32", "args": {"num_steps": 2}}, views={"size": 32})
    torch.manual_seed(0)
    weights = make_task(config).module.state_dict()
    averaged = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in weights.items()}
    state = {"step": 7, "config": config.model_dump(mode="json")}
    checkpoint.write(folder, Snapshot(state, {"weights": weights, "ema": averaged}))
    return folder


def features(run_dir: Path, file: str) -> torch.Tensor:
    """Features of the weights in the checkpoint, loaded by hand."""
    import timm

    tensors = checkpoint.load(checkpoint.folder(run_dir, 7)).tensors[file]
    model = timm.create_model("akorn_nano_patch4_32", num_classes=0, num_steps=2).eval()
    backbone = {n.removeprefix("backbone."): t for n, t in tensors.items() if n.startswith("backbone.")}
    model.load_state_dict(backbone)
    return model(fingerprint.fixed_input([2, 3, 32, 32])).detach()


def test_fresh_process_loads_bitwise_the_averaged_backbone(run_dir: Path, tmp_path: Path) -> None:
    assert export.main([str(run_dir)]) == 0
    arguments = [sys.executable, "-c", LOAD, str(run_dir / "export"), str(tmp_path / "features.pt")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(arguments, env=environment, check=True, capture_output=True, text=True)
    assert done.stderr == ""
    assert torch.equal(torch.load(tmp_path / "features.pt", weights_only=True), features(run_dir, "ema"))


def test_last_weights_of_a_step_on_demand(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export.main([str(run_dir), "--step", "7", "--weights", "last", "--out", str(out)]) == 0
    import timm

    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert torch.equal(model(fingerprint.fixed_input([2, 3, 32, 32])), features(run_dir, "weights"))
    assert json.loads((out / "config.json").read_text())["architecture"] == "akorn_nano_patch4_32"
    card = (out / "README.md").read_text()
    assert "local-dir" in card
    assert "not averaged" in card
    assert "running average" in (export.export(run_dir, tmp_path / "averaged") / "README.md").read_text()


def test_fingerprint_knows_its_own_weights_from_random_ones(run_dir: Path, tmp_path: Path) -> None:
    import timm

    out = export.export(run_dir, tmp_path / "out")
    fingerprint.check(timm.create_model(f"local-dir:{out}", pretrained=True), out)
    with pytest.raises(UserError, match="weights were not loaded"):
        fingerprint.check(timm.create_model("akorn_nano_patch4_32", num_classes=0, num_steps=2), out)
    damaged = timm.create_model(f"local-dir:{out}", pretrained=True)
    torch.nn.init.constant_(damaged.patch_embed.proj.bias, torch.nan)
    with pytest.raises(UserError, match="weights were not loaded"):
        fingerprint.check(damaged, out)


def test_others_may_read_an_export_and_nothing_else_is_replaced(run_dir: Path, tmp_path: Path) -> None:
    out = export.export(run_dir, tmp_path / "out")
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1
    (out / "model.safetensors").unlink()
    export.export(run_dir, out)
    assert (out / "model.safetensors").is_file()
    (out / ".git").mkdir()
    (out / ".git" / "config").write_text("a clone of a hub's repository")
    export.export(run_dir, out)
    assert (out / ".git" / "config").exists()
    assert {path.name for path in out.iterdir()} == {*export.FILES, ".git"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    for path in (tmp_path / "mine", tmp_path / "mine" / "thesis.tex"):
        with pytest.raises(UserError, match="holds other things"):
            export.export(run_dir, path)
    assert (tmp_path / "mine" / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("name", "args"), [("resnet18", {"channels": [4, 4, 4, 4]}), ("akorn_nano_patch4_32", {"img_size": 40})]
)
def test_an_export_says_at_which_size_it_was_trained(name: str, args: dict[str, Any], tmp_path: Path) -> None:
    import timm

    config = settings(model={"name": name, "args": args}, views={"size": 40})
    module = make_task(config).module
    state = {"step": 1, "config": config.model_dump(mode="json")}
    checkpoint.write(tmp_path, Snapshot(state, {"weights": module.state_dict()}))
    model = timm.create_model(f"local-dir:{export.export(tmp_path, tmp_path / 'out')}", pretrained=True)
    assert tuple(model.pretrained_cfg["input_size"]) == (3, 40, 40)
    assert "test_input_size" not in model.pretrained_cfg or model.pretrained_cfg["test_input_size"] is None


def test_a_folder_stands_for_an_export(run_dir: Path, tmp_path: Path) -> None:
    saved, out = checkpoint.folder(run_dir, 7), export.export(run_dir, tmp_path / "run" / "export")
    for folder in (out, out.parent):
        with export.exported(folder) as found:
            assert found == out
    with export.exported(saved) as found:
        assert (found / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert not found.exists()
    with pytest.raises(UserError, match="neither a run nor an export"), export.exported(tmp_path):
        pass


def test_errors_name_what_is_missing(run_dir: Path, tmp_path: Path) -> None:
    saved = checkpoint.newest(run_dir)
    with pytest.raises(UserError, match=r"is a checkpoint.*--out"):
        export.main([str(saved)])
    with pytest.raises(UserError, match=r"no checkpoint of step 8; there are 7"):
        export.main([str(run_dir), "--step", "8"])
    with pytest.raises(UserError, match="is no folder"):
        export.main([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="no whole checkpoint"):
        export.main([str(tmp_path)])


@pytest.mark.parametrize(("name", "pool"), [("akorn_nano_patch4_32", "avg"), ("itrsa_nano_patch4_32", "catavgmax")])
def test_a_pooling_of_ones_own_is_exported(tmp_path: Path, name: str, pool: str) -> None:
    import timm

    config = settings(model={"name": name, "args": {"num_steps": 1, "global_pool": pool}}, views={"size": 32})
    backbone = timm.create_model(name, num_classes=0, num_steps=1, global_pool=pool).eval()
    export._write(tmp_path / "export", backbone, config)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    images = fingerprint.fixed_input([2, 3, 32, 32])
    assert torch.equal(loaded(images), backbone(images))
