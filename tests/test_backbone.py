"""Every kind of `--ckpt` under one contract: ours, exports, published files, timm's; controls; strict loading."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import safe_open
from timm.models import save_for_hf

import pretrain  # noqa: F401
from configs import UserError
from downstream import classifier, solver
from downstream.backbone import load
from downstream.encoder import apply_control

SHARED = Path(os.environ.get("AKORN_SHARED", Path(__file__).resolve().parents[2] / "shared"))
MODEL = "akorn_nano_patch4_32"


@pytest.mark.parametrize(
    ("name", "size", "grid"),
    [
        (MODEL, 32, (8, 8)),
        ("itrsa_nano_patch4_32", 32, (8, 8)),
        ("akorn_conv_nano_patch4_32", 32, (8, 8)),
        ("vit_tiny_patch16_224", 64, (4, 4)),
        ("resnet10t", 64, (2, 2)),
        ("swin_s3_tiny_224", 224, (7, 7)),
    ],
)
def test_every_network_gives_pooled_features_and_a_map(name: str, size: int, grid: tuple[int, int]) -> None:
    encoder = load(name, control="random", img_size=size, device="cpu")
    features = encoder.encode(torch.rand(2, 3, size, size))
    assert features.pooled.shape[0] == 2
    assert features.map.shape[2:] == grid
    assert features.map.dtype == torch.float32


def test_each_process_of_a_node_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process's GPU, here a device without memory, is taken unless another device is asked for."""
    monkeypatch.setattr("downstream.backbone.own_device", lambda wanted: torch.device(wanted or "meta"))
    assert load(MODEL, control="random").device.type == "meta"
    assert load(MODEL, control="random", device="cpu").device.type == "cpu"


def test_map_of_a_transformer_lies_as_its_patches_do() -> None:
    encoder = load("vit_tiny_patch16_224", control="random", img_size=64, device="cpu")
    images = torch.zeros(2, 3, 64, 64)
    images[1, :, :16, 48:] = 1.0  # the last patch of the first row
    change = (encoder.encode(images).map[1] - encoder.encode(images).map[0]).norm(dim=0)
    assert change.flatten().argmax() == 3


def test_features_depend_on_the_start_and_not_on_the_batch() -> None:
    encoder = load(MODEL, control="random", device="cpu")
    images = torch.rand(3, 3, 32, 32)
    whole = encoder.encode(images).map
    torch.testing.assert_close(whole[1:2], encoder.encode(images[1:2]).map, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole, encoder.encode(images, start_seed=1).map)
    assert encoder.energy(images).shape == (3,)


def test_an_export_gives_its_features_and_damage_is_noticed(tmp_path: Path) -> None:
    from pretrain import fingerprint

    torch.manual_seed(1)
    model = timm.create_model(MODEL, num_classes=0).eval()
    save_for_hf(model, str(tmp_path / "export"), model_args={}, safe_serialization=True)
    (tmp_path / "export" / fingerprint.FILE).write_text(str(fingerprint.take(model, [1, 3, 32, 32])).replace("'", '"'))
    images = torch.rand(2, 3, 32, 32)
    expected = model.forward_features((images - 0.5) / 0.5)
    for ckpt in (tmp_path, tmp_path / "export", tmp_path / "export" / "model.safetensors"):
        torch.testing.assert_close(load(str(ckpt), device="cpu").encode(images).map, expected)
    random = load(str(tmp_path), control="random", device="cpu")
    assert not torch.allclose(random.encode(images).map, expected)
    with torch.no_grad():
        next(model.parameters()).mul_(2.0)
    save_for_hf(model, str(tmp_path / "export"), model_args={}, safe_serialization=True)
    with pytest.raises(UserError, match="does not give the features recorded"):
        load(str(tmp_path / "export"), device="cpu")


@pytest.mark.parametrize(("side", "grid"), [(32, 4), (64, 8), (45, 6), (5, 1)])
def test_an_exported_transformer_sees_images_of_any_size(side: int, grid: int, tmp_path: Path) -> None:
    small: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 8, "num_heads": 1}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **small)
    save_for_hf(model, str(tmp_path), model_args=small, safe_serialization=True)
    for control in (None, "random"):
        encoder = load(str(tmp_path), img_size=side, control=control)  # type: ignore[arg-type]
        assert encoder.encode(torch.rand(1, 3, side, side)).map.shape == (1, 8, grid, grid)


@pytest.mark.parametrize("loader", [load, classifier.load, solver.load])
def test_arguments_that_a_folder_would_not_take_are_refused(loader: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"args T: {tmp_path} says itself what it is"):
        loader(str(tmp_path), args={"T": 32})


@pytest.mark.parametrize("layer", ["readout", "oscillators", "0"])
def test_an_export_is_pooled_as_its_model_is(layer: str, tmp_path: Path) -> None:
    images = torch.rand(2, 3, 32, 32)
    found = load(MODEL, control="random", layer=layer, device="cpu")
    save_for_hf(found.model, str(tmp_path), safe_serialization=True)
    features = found.encode(images)
    torch.testing.assert_close(features.pooled, features.map.amax((2, 3)), rtol=0, atol=0)
    exported = load(str(tmp_path), layer=layer, device="cpu").encode(images)
    torch.testing.assert_close(exported.pooled, features.pooled, rtol=0, atol=0)


def test_a_classifier_is_told_from_a_damaged_backbone(tmp_path: Path) -> None:
    from pretrain import fingerprint

    small = {"embed_dim": 4, "depth": 2, "kernel_size": [3, 3], "num_steps": 2}
    model = timm.create_model("akorn_classifier_32", num_classes=10, **small).eval()
    save_for_hf(model, str(tmp_path / "export"), model_args=small, safe_serialization=True)
    (tmp_path / "export" / fingerprint.FILE).write_text(json.dumps(fingerprint.take(model, [1, 3, 32, 32])))
    with pytest.raises(UserError, match=f"{tmp_path} is a classifier"):
        load(str(tmp_path))


@pytest.mark.parametrize("args", [{"gamma": 0.1}, {"projection": False}, {"norm": "none"}, {"self_drift": True}])
def test_equal_weights_in_another_architecture_are_something_else(args: dict[str, Any]) -> None:
    """Features are kept by this digest: those of another step size would be taken for one's own."""
    plain, same, other = (load(MODEL, args=given, control="random", device="cpu") for given in ({}, {}, args))
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), other.model.parameters()))
    assert plain.digest() == same.digest() != other.digest()


def test_controls_change_what_they_say() -> None:
    images = torch.rand(1, 3, 32, 32)
    still = load(MODEL, control="random", device="cpu")
    plain = still.encode(images, oscillators=True)
    digest = still.digest()
    apply_control(still, "uncoupled")
    changed = images.clone()
    changed[:, :, :4, :4] = 1 - changed[:, :, :4, :4]
    gap = (still.encode(images).map - still.encode(changed).map).norm(dim=1)[0]
    assert gap[0, 0] > 0
    assert still.digest() != digest
    apply_control(still, "no_steps")
    assert plain.oscillators is not None
    fixed = still.encode(images, oscillators=True).oscillators
    assert fixed is not None
    torch.testing.assert_close(fixed, still.encode(changed, oscillators=True).oscillators)  # T = 0: the start alone
    with pytest.raises(ValueError, match="needs a model with oscillators"):
        apply_control(load("resnet10t", control="random", device="cpu"), "no_steps")


def test_a_weights_file_loads_by_name_by_order_or_not_at_all(tmp_path: Path) -> None:
    model = timm.create_model("resnet10t", num_classes=10)
    torch.save(model.state_dict(), tmp_path / "named.pth")
    torch.save({f"x.{i}": value for i, value in enumerate(model.state_dict().values())}, tmp_path / "ordered.pth")
    torch.save({"w": torch.zeros(3)}, tmp_path / "other.pth")
    images = torch.rand(1, 3, 64, 64)
    first = load(str(tmp_path / "named.pth"), arch="resnet10t", device="cpu").encode(images).map
    torch.testing.assert_close(
        first, load(str(tmp_path / "ordered.pth"), arch="resnet10t", device="cpu").encode(images).map
    )
    with pytest.raises(UserError, match="does not fit the model"):
        load(str(tmp_path / "other.pth"), arch="resnet10t", device="cpu")
    with pytest.raises(UserError, match="--arch NAME"):
        load(str(tmp_path / "other.pth"), device="cpu")


@pytest.mark.parametrize("side", [64, 72])
def test_a_weights_file_of_a_transformer_sees_images_of_any_size(side: int, tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True).eval()
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    encoder = load(str(tmp_path / "vit.pth"), arch="vit_tiny_patch16_224", img_size=side, device="cpu")
    seen = encoder._prepare(torch.rand(1, 3, side, side))
    assert seen.shape[-1] == 64
    with torch.no_grad():  # timm interpolates the positions while it runs, here they are interpolated once
        torch.testing.assert_close(encoder.model.forward_features(seen), model.forward_features(seen))


@pytest.mark.parametrize(("name", "size"), [("inception_v3", 32), ("crossvit_tiny_240", 240)])
def test_networks_that_give_no_map_at_a_size_are_named(name: str, size: int) -> None:
    with pytest.raises(UserError, match=f"{name} cannot be evaluated at \\d+ px"):
        load(name, control="random", img_size=size, device="cpu")


def test_steps_are_refused_where_there_are_none() -> None:
    with pytest.raises(UserError, match="steps=3 needs a model with oscillators or iterations, which resnet10t is not"):
        load("resnet10t", control="random", steps=3)


def test_layers_are_checked() -> None:
    with pytest.raises(UserError, match="has no oscillators"):
        load("resnet10t", control="random", layer="oscillators", device="cpu")
    with pytest.raises(UserError, match="level from 0 to"):
        load("resnet10t", control="random", layer="17", device="cpu")
    level = load("resnet10t", control="random", layer="2", device="cpu")
    assert level.encode(torch.rand(1, 3, 64, 64)).map.shape[2:] == (64 // level.patch, 64 // level.patch)


@pytest.mark.skipif(not (SHARED / "golden").is_dir(), reason="the published values are not at hand")
def test_a_published_file_gives_the_published_map(tmp_path: Path) -> None:
    import json

    from pretrain.models.oscillators import state_of

    with safe_open(SHARED / "golden" / "akorn_attn_gta.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        state = {
            key.removeprefix("state."): file.get_tensor(key) for key in sorted(file.keys()) if key.startswith("state.")
        }
        images, start, readout = (file.get_tensor(key) for key in ("images", "initial_oscillators", "readout"))
    torch.save(state, tmp_path / "model.pth")
    arguments = {key: config[key] for key in ("T", "heads", "imsize") if key in config}
    encoder = load(str(tmp_path / "model.pth"), args=arguments, device="cpu")
    n = encoder.model.n
    planes = encoder.model.forward_features((images - 0.5) / 0.5, start=state_of(start, n))
    published = readout.unflatten(1, (-1, n)).transpose(1, 2).flatten(1, 2)  # (K, n) to (n, K)
    torch.testing.assert_close(planes, published, rtol=1e-4, atol=1e-5)
