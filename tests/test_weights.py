"""Weights that come with the package: found by timm, loaded without a network, and as good as they are said to be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

import pretrain  # noqa: F401  (registers the models)
from configs import ObjectDiscoveryConfig
from downstream import object_discovery
from pretrain import make_shards
from pretrain.models.registry import WEIGHTS

NAMES = sorted(path.stem for path in WEIGHTS.glob("*.safetensors"))


def test_timm_lists_them_and_no_model_has_them_unasked() -> None:
    assert NAMES
    assert sorted(timm.list_models(["akorn*", "itrsa*"], pretrained=True)) == NAMES
    assert not timm.create_model(NAMES[0].split(".")[0]).pretrained_cfg.get("file")


@pytest.mark.parametrize("name", NAMES)
def test_each_loads_whole_and_is_small(name: str) -> None:
    assert (WEIGHTS / f"{name}.safetensors").stat().st_size < 2e6
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    first, second = (timm.create_model(name, pretrained=True, num_classes=0).eval() for _ in range(2))
    torch.testing.assert_close(first(images), second(images), rtol=0, atol=0)  # nothing is left to chance
    with_head = timm.create_model(name, pretrained=True, num_classes=7).eval()
    assert torch.equal(with_head.forward_features(images), first.forward_features(images))


def test_objects_in_scenes_never_seen(tmp_path: Path) -> None:
    """89.5 by docs/results.md, on 320 scenes; random weights 37."""
    assert make_shards.main(["tetrominoes", str(tmp_path / "scenes"), "--count", "64", "--seed", "977"]) == 0
    asked = {
        "ckpt": "akorn_nano_patch4_32.tetrominoes", "data": str(tmp_path / "scenes"), "preset": "tetrominoes",
        "starts": 1, "baselines": [], "pictures": 0, "bootstrap": 0, "device": "cpu", "out": str(tmp_path / "out"),
    }  # fmt: skip
    trained, untrained = object_discovery.run(ObjectDiscoveryConfig.model_validate_json(json.dumps(asked)))["models"]
    assert trained["scores"]["fg_ari"]["mean"] > 0.85
    assert trained["scores"]["fg_ari"]["mean"] > untrained["scores"]["fg_ari"]["mean"] + 0.3
