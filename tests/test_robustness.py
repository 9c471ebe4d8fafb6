"""downstream/robustness.py from end to end on tiny classifiers, and the errors."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

import pretrain  # noqa: F401
from configs.errors import UserError
from downstream import classifier, robust_pictures, robustness
from downstream.robust_scores import signs_of_masking
from pretrain.data.shards import ShardWriter

SMALL = {
    "akorn_classifier_32": {"embed_dim": 4, "depth": 2, "kernel_size": [3, 3], "num_steps": 2},
    "resnet10t": {},
}
BUDGET = [
    "--pgd-steps", "3", "--auto-steps", "3", "--auto-targets", "1", "--queries", "6", "--draws", "2", "--starts", "2",
    "--curve", "0.03", "0", "--severities", "5", "--pictures", "2", "--batch-size", "3",
]  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    with ShardWriter(folder / "a-000000.tar") as writer:
        for number in range(4):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
            writer.write(f"{number:04d}", {"png": file.getvalue(), "cls": str(number).encode()})
    return folder


@pytest.fixture(scope="module", params=sorted(SMALL))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "export"
    torch.manual_seed(0)
    model = timm.create_model(request.param, num_classes=10, **SMALL[request.param])
    save_for_hf(model, str(folder), model_args=SMALL[request.param], safe_serialization=True)
    return folder


def test_the_whole_test(exported: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--ckpt", str(exported), "--data", str(shards), "--out", str(tmp_path), *BUDGET]
    source = ["--transfer-from", str(exported), "--corruptions", "fog", "contrast"]
    assert robustness.main([*arguments, *source, "--eps-l2", "0.5", "--attacks", "fgsm", "pgd-l2", "autoattack"]) == 0
    document = json.loads((tmp_path / "results.json").read_text())
    is_random = "akorn" in str(exported)
    assert document["protocol"]["random_starts"] is is_random
    assert document["clean"]["fixed"]["images"] == 4
    settings = ("fixed", "eot") if is_random else ("fixed",)
    run = [(entry["attack"], entry["setting"]) for entry in document["attacks"]]
    assert run == [(attack, setting) for setting in settings for attack in ("fgsm", "pgd-l2", "autoattack")]
    for entry in document["attacks"]:
        assert entry["accuracy"] <= 100
        assert ("on_fresh_starts" in entry) == (is_random and entry["setting"] == "fixed")
        assert entry["queries"] > 0
    parts = [set(entry["broken_by"]) for entry in document["attacks"] if entry["attack"] == "autoattack"]
    assert parts[0] == {"clean", "apgd-ce", "apgd-t", "fab-t", "square"}
    if is_random:
        assert parts[1] == {"clean", "apgd-ce", "apgd-dlr"}
    assert [row["name"] for row in document["corruptions"]["rows"]] == ["fog", "contrast"]
    assert 0 <= document["corruptions"]["mean"]["ece"] <= 1
    assert [point["eps"] for point in document["curve"]] == [0, 0.03]
    assert document["transfer"]["from"] == "export"
    for picture in ("reliability.png", "curve.png", "adversarial.png"):
        assert (tmp_path / picture).stat().st_size > 5000
    assert "clean, fixed start" in capsys.readouterr().out


def test_parts_left_out_are_left_out(exported: Path, shards: Path, tmp_path: Path) -> None:
    nothing = [*BUDGET, "--attacks", "--curve", "--corruptions"]
    assert robustness.main(["--ckpt", str(exported), "--data", str(shards), "--out", str(tmp_path), *nothing]) == 0
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["clean"]["fixed"]["images"] == 4
    assert not document["attacks"]
    assert "corruptions" not in document


def test_images_are_read_resized_and_bounded(shards: Path) -> None:
    data = classifier.read(str(shards), limit=3, size=16, num_classes=10)
    assert data.images.shape == (3, 16, 16, 3)
    assert data.labels.tolist() == [0, 1, 2]
    tensors, _ = data.tensors(torch.device("cpu"))
    assert tensors.shape == (3, 3, 16, 16)
    assert 0 <= tensors.min() <= tensors.max() <= 1


def test_a_sample_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a-000000.tar") as writer:
        writer.write("torn", {"png": b"no picture", "cls": b"1"})
    with pytest.raises(UserError, match="sample torn cannot be read"):
        classifier.read(str(tmp_path), limit=None, size=None, num_classes=2)


@pytest.mark.filterwarnings("error:The given NumPy array is not writable")
def test_published_arrays_are_scored_at_their_own_size_only(exported: Path, shards: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "fog.npy", rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8))
    np.save(tmp_path / "labels.npy", np.tile(np.arange(4), 5))
    known = ["--ckpt", str(exported), "--data", str(shards), "--out", str(tmp_path / "out"), *BUDGET]
    arguments = [*known, "--attacks", "fgsm", "--cifar10c", str(tmp_path), "--corruptions", "fog"]
    with pytest.raises(UserError, match=r"are of 32 px, the images of 48: .* leave --cifar10c out"):
        robustness.main([*arguments, "--size", "48"])
    assert robustness.main(arguments) == 0
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["corruptions"]["rows"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ckpt", "/nowhere/run"], "is no run, export, weights file"),
        (["--ckpt", "SHARDS"], "neither a run nor an export"),
        (["--ckpt", "EXPORT", "--corruptions", "rain"], "no corruption 'rain'"),
        (["--ckpt", "EXPORT", "--corruptions", "frots"], "did you mean 'frost'"),
        (["--ckpt", "EXPORT", "--severities", "6"], "severity 6 does not exist"),
        (["--ckpt", "EXPORT", "--severities"], "severities.*at least 1 item"),
        (["--ckpt", "EXPORT", "--transfer-from", "/nowhere/run"], "is no run, export, weights file"),
        (["--ckpt", "EXPORT", "--transfer-from", "TWO"], "has 2 classes, .* has 10"),
        (["--ckpt", "EXPORT", "--transfer-from", "VIT"], "takes images of 64 px only, these have 32: give --size 64"),
        (["--ckpt", "EXPORT", "--cifar10c", "/nowhere", "--corruptions", "fog"], "fog.npy is missing"),
        ([], "no classifier"),
    ],
)
def test_errors_say_what_to_do_before_any_attack(
    arguments: list[str], message: str, exported: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"EXPORT": str(exported), "SHARDS": str(shards), "TWO": str(tmp_path), "VIT": str(tmp_path)}
    filled = [known.get(argument, argument) for argument in arguments]
    if "TWO" in arguments:
        save_for_hf(timm.create_model("resnet10t", num_classes=2), str(tmp_path), safe_serialization=True)
    if "VIT" in arguments:
        small: dict[str, Any] = {"img_size": 64, "patch_size": 32, "depth": 1, "embed_dim": 8, "num_heads": 1}
        vit = timm.create_model("vit_tiny_patch16_224", num_classes=10, **small)
        save_for_hf(vit, str(tmp_path), model_args=small, safe_serialization=True)
    monkeypatch.setattr(robustness, "measure", lambda *arguments: pytest.fail("measured"))
    with pytest.raises(UserError, match=message):
        robustness.main([*filled, "--data", str(shards)])


def test_labels_beyond_the_classes_and_backbones_are_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has label 2; the classifier has 2 classes"):
        classifier.read(str(shards), limit=None, size=None, num_classes=2)
    save_for_hf(timm.create_model("resnet10t", num_classes=0), str(tmp_path), safe_serialization=True)
    with pytest.raises(UserError, match="has no classes"):
        classifier.load(str(tmp_path))


def test_signs_of_masking() -> None:
    def point(eps: float, pgd: float, random: float, loss: float) -> dict[str, float]:
        return {"eps": eps, "pgd_accuracy": pgd, "random_accuracy": random, "pgd_loss": loss, "random_loss": 0.0}

    honest = {"curve": [point(0, 90, 90, 0.3), point(0.03, 20, 60, 4), point(0.25, 0, 5, 20)], "attacks": []}
    assert signs_of_masking(honest) == []
    masked = {
        "curve": [point(0, 90, 90, 0.3), point(0.03, 80, 60, 0.9), point(0.25, 70, 40, 0.8)],
        "attacks": [{"attack": "pgd", "setting": "fixed", "accuracy": 80.0}],
        "transfer": {"from": "resnet", "accuracy": 50.0},
    }
    signs = " / ".join(signs_of_masking(masked))
    for expected in ("random search beats PGD at eps 0.0300", "loss falls", "still right at eps 0.250", "transfer"):
        assert expected in signs


def test_pictures_of_adversarial_images(tmp_path: Path) -> None:
    clean = torch.rand(3, 3, 8, 8)
    robust_pictures.examples(tmp_path / "one.png", clean, {"pgd fixed": (clean + 0.01).clamp(0, 1)})
    robust_pictures.examples(tmp_path / "two.png", clean, {"pgd fixed": clean, "fgsm fixed": clean})
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert two.height > one.height  # a row of images and one of perturbations for each attack
