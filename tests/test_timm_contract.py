"""What timm expects of its models, asked of all models here: on small ones here, on the large ones when marked slow.

Follows what timm's own suite checks (forward, backward, default configurations, head, features, intermediates,
recomputation, input sizes), and what its users do: hub export, layer decay, freezing, torch.export.
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import FeatureInfo, group_parameters, load_state_dict, save_for_hf
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

import pretrain  # noqa: F401  (registers the models)

NAMES = sorted(timm.list_models("akorn*") + timm.list_models("itrsa*"))
LIGHT = [name for name in NAMES if "nano" in name and "64" not in name] + ["akorn_classifier_32"]
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 4, "num_steps": 2}
CLASSIFIER = {"embed_dim": 8, "depth": 3, "num_steps": 1}


def small(name: str, **kwargs: Any) -> Any:
    """A model of that name, narrow, so that every entry point can be tried."""
    size = CLASSIFIER if "classifier" in name else SMALL
    return timm.create_model(name, **{**size, **kwargs})


def reduced(model: Any, target: int) -> tuple[int, ...]:
    """The input size that timm's suite takes: at most `target`."""
    return tuple(min(side, target) for side in model.default_cfg["input_size"])


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_recomputation(name: str) -> None:
    torch.manual_seed(0)
    model = small(name).eval()
    images = torch.randn(1, *reduced(model, 384))
    with torch.no_grad():
        logits = model(images)
    assert logits.shape == (1, model.default_cfg["num_classes"])
    assert logits.isfinite().all()
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(images), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_backward_reaches_every_parameter(name: str) -> None:
    model = small(name, num_classes=42).train()
    logits = model(torch.randn(2, *reduced(model, 128)))
    logits.mean().backward()
    assert logits.shape == (2, 42)
    assert [key for key, value in model.named_parameters() if value.grad is None] == []


@pytest.mark.parametrize("name", NAMES)
def test_default_configuration_and_head(name: str) -> None:
    model = small(name).eval()
    config, state = model.default_cfg, model.state_dict()
    images = torch.randn(1, *config["input_size"])
    with torch.no_grad():
        features = model.forward_features(images)
        pooled = model.forward_head(features, pre_logits=True)
        assert features.shape == (1, model.num_features, *config["pool_size"])
        assert pooled.shape == (1, model.head_hidden_size)
        model.reset_classifier(0)
        assert model.num_classes == 0
        assert torch.equal(model(images), pooled)
        model.reset_classifier(0, "")
        assert torch.equal(model(images), features)
        model.reset_classifier(7, "avg")
        assert model(images).shape == (1, 7)
        assert model.get_classifier().weight.shape == (7, model.num_features)
    assert small(name, num_classes=0, global_pool="").eval()(images).shape == features.shape
    for key in (config["classifier"], config["first_conv"]):
        assert f"{key}.weight" in state


@pytest.mark.parametrize("name", NAMES)
def test_features_and_intermediates(name: str) -> None:
    model = small(name, features_only=True).eval()
    images = torch.randn(1, *reduced(model, 96))
    channels, reductions = model.feature_info.channels(), model.feature_info.reduction()
    assert len(channels) >= 3
    outputs = model(images)
    assert len(outputs) == len(channels)
    for output, width, reduction in zip(outputs, channels, reductions, strict=True):
        assert output.shape[:2] == (1, width)
        assert max(output.shape[2:]) <= math.ceil(images.shape[-1] / reduction) + 1
    full = small(name).eval()
    final, levels = full.forward_intermediates(images)
    assert len(levels) == len(FeatureInfo(full.feature_info, len(full.feature_info)).channels())
    assert torch.equal(final, full.forward_features(images))
    full.set_grad_checkpointing()
    torch.testing.assert_close(full.forward_intermediates(images)[0], final, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LIGHT)
def test_every_option_of_intermediates(name: str) -> None:
    model = small(name).eval()
    images = torch.randn(2, 3, 32, 32)
    final, levels = model.forward_intermediates(images, output_fmt="NCHW")
    normed = model.forward_intermediates(images, norm=True, intermediates_only=True)
    assert torch.equal(normed[-1], final)
    tokens = model.forward_intermediates(images, indices=[0, -1], output_fmt="NLC", intermediates_only=True)
    assert len(tokens) == 2
    assert torch.equal(tokens[1], levels[-1].flatten(2).transpose(1, 2))
    last_two = model.forward_intermediates(images, indices=2, return_prefix_tokens=True)[1]
    assert torch.equal(last_two[0], levels[-2])
    early, some = model.forward_intermediates(images, indices=(0, 2), stop_early=True)
    assert torch.equal(some[1], levels[2])
    assert torch.equal(early, model.norm(levels[2].flatten(2).mT).mT.unflatten(2, levels[2].shape[2:]))
    named = model.forward_intermediates(images, indices=1, output_dict=True)
    assert set(named) == {"image_intermediates", "image_features"}
    assert torch.equal(named["image_features"], final)
    with pytest.raises(ValueError, match="NCHW or NLC"):
        model.forward_intermediates(images, output_fmt="NHWC")


@pytest.mark.parametrize("name", LIGHT)
@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_pruning_keeps_the_features_and_drops_the_rest(name: str, index: int) -> None:
    model = small(name).eval()
    images = torch.randn(1, 3, 32, 32)
    expected = model.forward_intermediates(images, indices=[index], intermediates_only=True)[0]
    before = sum(p.numel() for p in model.parameters())
    assert model.prune_intermediate_layers([index], prune_norm=True) == [index]
    assert sum(p.numel() for p in model.parameters()) < before
    kept = model.forward_intermediates(images, indices=[index], intermediates_only=True, stop_early=True)[0]
    assert torch.equal(kept, expected)
    if index == 0:  # the stem alone: what starts the oscillators stays behind, unused
        return
    kept.sum().backward()
    assert [key for key, value in model.named_parameters() if value.grad is None] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", LIGHT)
def test_other_precisions(name: str, dtype: torch.dtype) -> None:
    model, images = small(name, num_classes=3).eval(), torch.randn(2, 3, 32, 32)
    logits, normed = model(images), model.forward_intermediates(images, norm=True, intermediates_only=True)[-1]
    model.to(dtype)
    assert model(images.to(dtype)).dtype == dtype
    torch.testing.assert_close(model(images.to(dtype)).float(), logits, rtol=0, atol=0.05)
    other = model.forward_intermediates(images.to(dtype), norm=True, intermediates_only=True)[-1]
    torch.testing.assert_close(other.float(), normed, rtol=0, atol=0.1)


@pytest.mark.parametrize("name", LIGHT)
def test_input_sizes_and_channels(name: str) -> None:
    model = small(name, img_size=[40, 24], in_chans=4, num_classes=0).eval()
    assert model(torch.randn(2, 4, 40, 24)).shape == (2, model.num_features)
    assert model(torch.randn(2, 4, 24, 32)).isfinite().all()
    before = model.forward_features(torch.ones(1, 4, 48, 48))
    model.set_input_size(img_size=48)
    after = model.forward_features(torch.ones(1, 4, 48, 48))
    torch.testing.assert_close(before, after)
    if "classifier" not in name:
        model.set_input_size(img_size=(32, 64), patch_size=8)
        assert model.forward_features(torch.randn(1, 4, 32, 64)).shape[2:] == (4, 8)
        assert {info["reduction"] for info in model.feature_info} == {8}
        model.set_input_size(patch_size=4)
        assert model.forward_features(torch.randn(1, 4, 32, 64)).shape[2:] == (8, 16)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("akorn_nano_patch4_32", {}),
        ("akorn_nano_patch4_32", {"positions": "abs"}),
        ("itrsa_nano_patch4_32", {"positions": "abs"}),
        ("akorn_classifier_mixed_32", {"num_heads": 4}),
    ],
)
def test_pretrained_weights_at_another_size_are_those_at_their_own_resized(
    name: str, args: dict[str, Any], tmp_path: Path
) -> None:
    model, images = small(name, num_classes=0, **args).eval(), torch.randn(1, 3, 48, 24)
    save_for_hf(model, str(tmp_path / "square"), safe_serialization=True)
    model.set_input_size((48, 24))
    loaded = timm.create_model(f"local-dir:{tmp_path / 'square'}", pretrained=True, img_size=(48, 24)).eval()
    assert torch.equal(loaded(images), model(images))
    save_for_hf(model, str(tmp_path / "long"), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path / 'long'}", pretrained=True).eval()
    assert torch.equal(again(images), model(images))
    if "classifier" not in name:  # as many tokens, in other places
        turned = timm.create_model(f"local-dir:{tmp_path / 'long'}", pretrained=True, img_size=(24, 48)).eval()
        model.set_input_size((24, 48))
        assert torch.equal(turned(images.mT), model(images.mT))


@pytest.mark.parametrize("name", ["akorn_nano_patch4_32", "akorn_classifier_32"])
def test_models_made_empty_get_their_start(name: str) -> None:
    model, images = small(name, num_classes=0).eval(), torch.randn(1, 3, 32, 32)
    with torch.device("meta"):
        empty = small(name, num_classes=0).eval()
    empty.to_empty(device="cpu")
    for module in empty.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    empty.load_state_dict(model.state_dict())
    assert torch.equal(empty(images), model(images))


@pytest.mark.parametrize("name", ["akorn_nano_patch4_32", "itrsa_nano_patch4_32", "akorn_classifier_32"])
def test_hub_export_keeps_what_was_set_after_construction(name: str, tmp_path: Path) -> None:
    model, images = small(name, num_classes=0).eval(), torch.randn(1, 3, 32, 32)
    model.set_steps(4)
    if hasattr(model, "set_start_seed"):
        model.set_start_seed(7)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(images), model(images))


@pytest.mark.parametrize("pool", ["max", "avg", "avgmax", "catavgmax"])
def test_pools(pool: str) -> None:
    torch.manual_seed(0)
    model = small("akorn_nano_patch4_32", global_pool=pool, num_classes=5, drop_rate=0.1).eval()
    images = torch.randn(2, 3, 32, 32)
    maps = model.forward_features(images).flatten(2)
    most, mean = maps.amax(2), maps.mean(2)
    expected = {"max": most, "avg": mean, "avgmax": (most + mean) / 2, "catavgmax": torch.cat([mean, most], 1)}[pool]
    torch.testing.assert_close(model.forward_head(model.forward_features(images), pre_logits=True), expected)
    assert model.head_hidden_size == expected.shape[1]
    assert model(images).shape == (2, 5)


@pytest.mark.parametrize("name", LIGHT)
def test_layer_decay_weight_decay_and_freezing(name: str) -> None:
    model = small(name)
    groups = param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.5)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    scales = sorted({group["lr_scale"] for group in groups})
    assert scales[-1] == 1.0
    assert len(scales) == (5 if "classifier" in name else 4)  # stem, blocks, head (the output norm goes with the last)
    exempt = model.no_weight_decay()
    decayed = param_groups_weight_decay(model, 0.1, no_weight_decay_list=exempt)[1]["params"]
    names = {id(value): key for key, value in model.named_parameters()}
    assert all(key.endswith("weight") for key in map(names.get, map(id, decayed)))
    assert not any("gta" in key for key in map(names.get, map(id, decayed)))
    layers = group_parameters(model, model.group_matcher())
    assert len(layers) >= 3
    timm.utils.freeze(model, ["blocks"])
    assert not any(p.requires_grad for p in model.blocks.parameters())


@pytest.mark.parametrize("name", LIGHT)
def test_export_and_compile_free_graph(name: str) -> None:
    model = small(name, num_classes=3).eval()
    images = torch.randn(2, 3, 32, 32)
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(exported(images), model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LIGHT)
def test_hub_layout_and_checkpoint_path_give_the_weights_back(name: str, tmp_path: Path) -> None:
    size = CLASSIFIER if "classifier" in name else SMALL
    model = small(name, num_classes=0).eval()
    save_for_hf(model, tmp_path, model_args=dict(size), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), again(images))
    other = small(name, num_classes=0, checkpoint_path=str(tmp_path / "model.safetensors")).eval()
    assert torch.equal(model(images), other(images))
    assert set(load_state_dict(str(tmp_path / "model.safetensors"))) == set(model.state_dict())


def test_images_that_an_adapted_first_layer_takes(tmp_path: Path) -> None:
    """timm adapts the first layer of pretrained weights to other channels."""
    model = small("akorn_nano_patch4_32", num_classes=0)
    save_for_hf(model, tmp_path, model_args=dict(SMALL), safe_serialization=True)
    grey = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=1, num_classes=5)
    assert grey(torch.randn(1, 1, 32, 32)).shape == (1, 5)
    torch.testing.assert_close(grey.patch_embed.proj.weight, model.patch_embed.proj.weight.sum(1, keepdim=True))


def test_importing_adds_little_to_timm() -> None:
    code = (
        "import time, torch, timm, timm.layers\n"
        "start = time.process_time()\n"
        "import pretrain\n"
        "print(time.process_time() - start)"
    )
    root = Path(__file__).resolve().parents[1]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert float(found.stdout) < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_full_width_backward(name: str) -> None:
    model = timm.create_model(name, num_classes=42).train()
    logits = model(torch.randn(2, *reduced(model, 128)))
    logits.mean().backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in model.parameters())
