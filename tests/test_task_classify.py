"""The classification task: its loss, labels, keyed AugMix, independence of chunks."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from configs.errors import UserError
from configs.schema import PretrainConfig
from pretrain.data.batch import Batch
from pretrain.data.decode import BrokenImageError
from pretrain.tasks import make_task
from pretrain.tasks.classify import ClassifyTransform, augmix

SMALL = {"embed_dim": 4, "depth": 2, "kernel_size": [3, 3], "num_steps": 2, "batch_norm": False}


def config_of(name: str = "akorn_classifier_32", **arguments: Any) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {
            "name": "test",
            "batch_size": 4,
            "steps": 1,
            "task": {"name": "classify", "num_classes": 5, "augmix": True},
            "model": {"name": name, "args": arguments},
            "data": {"shards": "nowhere"},
            "views": {"size": 32, "scale": (0.2, 1.0), "flip": 0.5},
        }
    )


def sample(label: bytes = b"3") -> dict[str, bytes]:
    file = io.BytesIO()
    Image.fromarray(data.astronaut()[:64, 200:264]).save(file, "PNG")
    return {"png": file.getvalue(), "cls": label}


def made_of(transform: ClassifyTransform, parts: dict[str, bytes], epoch: int, number: int) -> dict[str, np.ndarray]:
    return transform(parts, transform.draws(np.array([epoch]), np.array([number]))[0])()


def batch_of(transform: ClassifyTransform, count: int) -> Batch:
    arrays = [made_of(transform, sample(str(number % 5).encode()), 0, number) for number in range(count)]
    tensors = {name: torch.from_numpy(np.stack([array[name] for array in arrays])) for name in arrays[0]}
    numbers = torch.arange(count)
    return Batch(tensors, numbers, torch.zeros(count, dtype=torch.int64), numbers, 0)


@pytest.mark.parametrize(("name", "arguments"), [("akorn_classifier_32", SMALL), ("vit_tiny_patch16_224", {})])
def test_embeddings_and_loss(name: str, arguments: dict[str, Any]) -> None:
    if name.startswith("vit"):
        arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1}
    torch.manual_seed(0)
    task = make_task(config_of(name, **arguments))
    batch = batch_of(task.transform, 4)
    task.module.train()
    whole = task.embed(batch)
    assert whole.shape == (4, 5)
    parts = torch.cat([task.embed(batch[:3]), task.embed(batch[3:])])
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)
    loss, metrics = task.loss(torch.zeros(4, 5), batch)
    assert loss.item() == pytest.approx(math.log(5))
    assert metrics["accuracy"].item() == 0.25  # the first class is the largest of equals, and right once in four
    assert task.module is task.backbone


def test_views_and_labels_are_pure() -> None:
    transform = make_task(config_of(**SMALL)).transform
    first, again = made_of(transform, sample(), 1, 2), made_of(transform, sample(), 1, 2)
    assert first["images"].shape == (1, 3, 32, 32)
    assert first["label"] == 3
    assert all((first[name] == again[name]).all() for name in first)
    assert (first["images"] != made_of(transform, sample(), 2, 2)["images"]).any()


def test_augmix_is_keyed_and_leaves_the_stream_alone() -> None:
    images = np.random.default_rng(0).integers(0, 256, (1, 3, 32, 32), dtype=np.uint8)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, two, same = augmix(images, 1), augmix(images, 2), augmix(images, 1)
    assert torch.equal(torch.rand(1), expected)
    assert (one == same).all()
    assert (one != two).any()
    assert one.dtype == np.uint8


@pytest.mark.parametrize(
    ("label", "kind", "message"),
    [
        (b"", BrokenImageError, "no label"),  # a broken sample, which the loader replaces
        (b"tench", BrokenImageError, "no label"),
        (b"7", UserError, "label 7, but task.num_classes=5"),
    ],
)
def test_bad_labels_are_named(label: bytes, kind: type[Exception], message: str) -> None:
    transform = ClassifyTransform(config_of().views, 0, 5, 10**6)
    with pytest.raises(kind, match=message):
        made_of(transform, sample(label), 0, 0)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vit_tiny_patch16_224", {"embed_dim": 24, "depth": 1}, r"224 x 224 .*views\.size=32.*img_size=32"),
        ("vit_tiny_patch16_224", {"embed_dim": 24, "depth": 1, "dynamic_img_size": True, "patch_size": 64}, "a patch"),
    ],
)
def test_views_that_a_model_cannot_take_are_refused(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_task(config_of(name, **arguments))
