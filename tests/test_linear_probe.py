"""The probe end to end on generated images, its features on disk, the segmentation probe, online evaluation."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from configs import LinearProbeConfig, UserError
from configs.presets import Preset
from downstream import features, linear_probe, online, segmentation, views
from downstream.backbone import load
from downstream.samples import Samples
from pretrain.data.shards import ShardWriter

MODEL = "akorn_nano_patch4_32"


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, count: int, seed: int) -> Path:
    """Red or green discs on noise: the class is the colour, the mask is the disc."""
    generator = np.random.default_rng(seed)
    folder.mkdir()
    rows, columns = np.mgrid[:32, :32]
    with ShardWriter(folder / "a-000000.tar") as writer:
        for number in range(count):
            label = number % 2
            image = generator.integers(0, 60, (32, 32, 3)).astype(np.uint8)
            top, left = generator.integers(8, 24, 2)
            disc = (rows - top) ** 2 + (columns - left) ** 2 < 49
            image[disc, label] = 255
            classes = (disc * (label + 1)).astype(np.uint8)
            masks = {"classes.png": png(classes), "instances.png": png(disc.astype(np.uint8))}
            writer.write(f"{number:04d}", {"png": png(image), "cls": str(label).encode(), **masks})
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("labelled")
    return write(folder / "train", 48, 0), write(folder / "test", 16, 1)


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    import downstream.backbone as backbone

    monkeypatch.setattr(backbone._Source, "_of_timm", lambda self, name: self._created(name))


def config(shards: tuple[Path, Path], **values: object) -> LinearProbeConfig:
    known = {
        "ckpt": MODEL, "train": str(shards[0]), "data": str(shards[1]), "epochs": 8, "rates": [0.001, 0.01],
        "batch_size": 16, "head_batch": 16, "knn": [5], "device": "cpu",
    }  # fmt: skip
    return LinearProbeConfig.model_validate_json(json.dumps(known | values))


@pytest.mark.usefixtures("untrained")
def test_a_whole_probe(shards: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"features": ["avg", "oscillators"], "low_shot": [0.5], "crops": 1, "keep_features": True}
    linear_probe.run(config(shards, **options), out_dir=tmp_path)
    written = json.loads((tmp_path / "results.json").read_text())
    assert [entry["name"] for entry in written["models"]] == [MODEL, f"{MODEL} (random)", "raw pixels"]
    ours, _, pixels = written["models"]
    assert {head["features"] for head in ours["linear"]["heads"]} == {"avg", "oscillators", "all"}
    assert pixels["linear"]["top1"] > 0.9  # the colour is in the pixels
    assert ours["low_shot"]["0.5"]["train_images"] == 24
    assert 0 <= ours["knn"]["5"]["top1"] <= 1
    keys = next((tmp_path / "features").glob("*/keys.txt")).read_text().split()
    assert keys == sorted(keys)
    assert "48 training and 16 test images" in capsys.readouterr().out


@pytest.mark.usefixtures("untrained")
def test_a_cache_given_loses_nothing_but_what_was_made_for_this(shards: tuple[Path, Path], tmp_path: Path) -> None:
    cache = tmp_path / "scratch"
    cache.mkdir()
    (cache / "thesis.tex").write_text("years of work")
    options = {"cache_dir": str(cache), "controls": [], "features": ["avg"]}
    linear_probe.run(config(shards, **options, keep_features=True), out_dir=tmp_path / "out")
    kept = sorted(path.name for path in cache.iterdir())
    assert len(kept) == 3  # training and test features
    linear_probe.run(config(shards, **options, seed=1), out_dir=tmp_path / "out")
    linear_probe.run(config(shards, **options), out_dir=tmp_path / "out")
    assert sorted(path.name for path in cache.iterdir()) == kept


@pytest.mark.usefixtures("untrained")
def test_random_copies_are_those_of_the_features_that_are_probed(
    shards: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with two processes, which must all extract the copies: rank 0 would wait for them otherwise."""
    seen: dict[str, set[int]] = {}

    def table(self: Any, encoder: Any, samples: Samples, *, copy: int) -> Any:
        name = "pixels" if encoder is None else encoder.name
        seen.setdefault(name, set()).add(copy)
        return None

    monkeypatch.setattr(linear_probe._Probing, "_table", table)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    linear_probe.run(config(shards, crops=2), out_dir=tmp_path)
    assert seen == {MODEL: {0, 1, 2}, f"{MODEL} (random)": {0, 1, 2}, "pixels": {0}}


def test_features_are_shared_resumed_and_in_order(
    shards: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, seen = Samples(str(shards[1])), []

    def compute(images: torch.Tensor, positions: list[int]) -> dict[str, torch.Tensor]:
        seen.extend(positions)
        return {"pixels": features.pixels_of(images), "place": torch.tensor(positions)[:, None].float()}

    options = {"resize": 32, "size": 32, "batch_size": 4, "description": {}}
    folder = tmp_path / "table"
    features._create(folder, 16, {"pixels": 3072, "place": 1}, {})
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert features.extract(folder, samples, compute, **options) is None
    assert seen == [4, 5, 6, 7, 12, 13, 14, 15]
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("RANK", "0")
    (folder / "done_killed.txt").write_text("2")  # within a number: not block 2, nor anything else
    table = features.extract(folder, samples, compute, **options)
    assert table is not None
    assert seen[8:] == [0, 1, 2, 3, 8, 9, 10, 11]
    assert features._done(folder) == {0, 1, 2, 3}
    assert table.take("place").flatten().tolist() == list(range(16))
    torch.testing.assert_close(table.take("pixels")[3], samples.image(3).flatten())
    assert table.take("all").shape == (16, 3073)


def test_crops_are_keyed_by_position() -> None:
    images = torch.rand(3, 3, 32, 32)
    together = views.crop_and_flip(images, [5, 6, 7], seed=1, copy=2)
    torch.testing.assert_close(together[1:2], views.crop_and_flip(images[1:2], [6], seed=1, copy=2))
    assert not torch.equal(together, views.crop_and_flip(images, [5, 6, 7], seed=1, copy=3))
    assert together.shape == images.shape


def test_segmentation_probe_finds_coloured_discs(shards: tuple[Path, Path]) -> None:
    encoder = load(MODEL, control="random", device="cpu")
    train, test = (Samples(str(folder)) for folder in shards)
    found = segmentation.probe_segmentation(
        encoder, train, test, Preset(32, 2), rates=[0.01, 0.1], epochs=10, held_out=0.2, batch_size=16
    )
    assert len(found["classes"]) == 3  # type: ignore[arg-type]
    assert float(str(found["miou"])) > 0.5  # untrained features still tell red from green


def test_iou_and_token_labels_of_known_cases() -> None:
    table = torch.tensor([[2, 1, 0], [0, 3, 0], [0, 0, 0]])
    scores = segmentation.class_iou(table)
    assert scores[:2].tolist() == pytest.approx([2 / 3, 3 / 4])
    assert scores[2].isnan()
    classes = torch.tensor([[[1, 1, -1, -1], [1, 0, -1, 2]]])
    assert segmentation.token_classes(classes, (1, 2)).tolist() == [[1, -1]]


@pytest.mark.parametrize(
    ("values", "message"), [({"train": None}, "give --train"), ({"data": "/none"}, "no shards at /none")]
)
def test_errors_say_what_to_do(shards: tuple[Path, Path], values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        linear_probe.run(config(shards, **values))


@pytest.mark.parametrize("share", [0.0, -0.1, 1.0, 10.0])
def test_shares_of_the_labels_lie_between_none_and_all(shards: tuple[Path, Path], share: float) -> None:
    with pytest.raises(ValidationError, match="low_shot"):
        config(shards, low_shot=[share])


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("first", [32, 64])
def test_one_small_image_does_not_change_how_all_are_cut(tmp_path: Path, first: int) -> None:
    with ShardWriter(tmp_path / "a-000000.tar") as writer:
        for number, side in enumerate([first, *[64] * 7]):
            image = png(np.full((side, side + 8, 3), number, np.uint8))
            writer.write(f"{number:04d}", {"png": image, "cls": str(number % 2).encode()})
    probing = linear_probe._Probing(config((tmp_path, tmp_path), size=32, controls=[]), tmp_path / "out")
    assert probing.resize == 37


@pytest.mark.parametrize("key", ["rates", "features"])
def test_a_probe_needs_something_to_learn_from(shards: tuple[Path, Path], key: str) -> None:
    with pytest.raises(ValidationError, match=key):
        config(shards, **{key: []})


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"images": 2}, "the training set has one image a class"),
        ({"low_shot": [0.01]}, "a share of 0.01 of the labels"),
    ],
)
def test_nothing_to_hold_out_is_said_at_once(
    shards: tuple[Path, Path], tmp_path: Path, values: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        linear_probe.run(config(shards, **values), out_dir=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("untrained")
def test_features_that_a_backbone_does_not_have_are_named(shards: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="features=oscillators: resnet10t has none of these"):
        linear_probe.run(config(shards, ckpt="resnet10t", features=["oscillators"], controls=[]), out_dir=tmp_path)


def test_features_that_are_not_finite_are_an_error(shards: tuple[Path, Path], tmp_path: Path) -> None:
    options = {"resize": 32, "size": 32, "batch_size": 4, "description": {}}
    broken = {"avg": torch.tensor([[1.0], [2.0], [torch.nan], [0.0]])}
    with pytest.raises(UserError, match="not finite"):
        features.extract(tmp_path, Samples(str(shards[1])), lambda images, positions: broken, **options)


def test_online_evaluation_gives_figures(shards: tuple[Path, Path]) -> None:
    backbone = load(MODEL, control="random", device="cpu").model
    training: Any = SimpleNamespace(views=SimpleNamespace(size=32))
    wanted = SimpleNamespace(
        knn_every=5, knn_train=str(shards[0]), knn_test=str(shards[1]), images=8, objects_every=10,
        objects_data=str(shards[1]), objects_preset="tetrominoes",
    )  # fmt: skip
    observers = online.make_observers(SimpleNamespace(observers=wanted))  # type: ignore[arg-type]
    assert [observer.every for observer in observers] == [5, 10]
    figures: dict[str, float] = {}
    for observer in pickle.loads(pickle.dumps(observers)):  # as they reach the process that evaluates
        figures |= observer.observe(backbone, training, torch.device("cpu"))
    assert set(figures) == {"online_knn", "online_fg_ari", "online_mbo_i"}
    assert all(0 <= value <= 1 for value in figures.values())
