"""Sources with masks (PascalVOC, COCO, CLEVRTex), each on a small input in its original format."""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from source_inputs import SHARED, request, samples_of, tar_of
from test_make_shards import photo

from configs.errors import UserError
from pretrain.data.decode import decode_image, decode_mask
from pretrain.data.sources import clevrtex, coco, voc
from pretrain.data.sources.picture import encode_jpeg, encode_png
from pretrain.data.sources.sample import Broken, Sample


def test_voc_keeps_its_palette_masks(tmp_path: Path) -> None:
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for name in ("JPEGImages", "SegmentationObject", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    labels = np.zeros((40, 60), np.uint8)
    labels[5:20, 5:20], labels[20:30, 20:30], labels[4, :] = 1, 2, 255
    other = tmp_path / "VOCdevkit" / "VOC2007" / "ImageSets" / "Segmentation"  # an earlier year beside it
    other.mkdir(parents=True)
    (other / "val.txt").write_text("000032\n")
    for name in ("2007_000032", "2007_000033"):
        (root / "JPEGImages" / f"{name}.jpg").write_bytes(encode_jpeg(photo(4)))
        for folder_ in ("SegmentationObject", "SegmentationClass"):
            image = Image.fromarray(labels, "P")
            image.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
            image.save(root / folder_ / f"{name}.png")
    (root / "ImageSets/Segmentation/val.txt").write_text("2007_000033\n2007_000032\n")
    for place in (tmp_path / "VOCdevkit", root, tar_of(tmp_path / "VOCdevkit", "w", tmp_path / "voc.tar")):
        sources = voc.open_source("voc", request(place, tmp_path))
        assert list(sources) == ["val"]
        sample = samples_of(sources["val"])[0]
        assert sample.key.endswith("2007_000033")
        np.testing.assert_array_equal(decode_mask(sample.parts["instances.png"]), labels)
    (root / "SegmentationClass" / "2007_000032.png").unlink()
    (root / "ImageSets/Segmentation/train.txt").write_text("2007_000033\n")
    assert list(voc.open_source("voc", request(root, tmp_path, splits=("train",)))) == ["train"]
    with pytest.raises(UserError, match=r"SegmentationClass/2007_000032.png is not there"):
        voc.open_source("voc", request(root, tmp_path))


def write_coco(root: Path, annotations: list[dict[str, Any]]) -> None:
    (root / "val2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    (root / "val2017" / "000000000009.jpg").write_bytes(encode_jpeg(photo(9, 20, 30)))
    content = {
        "images": [{"id": 9, "file_name": "000000000009.jpg", "height": 20, "width": 30}],
        "annotations": [{"image_id": 9, **entry} for entry in annotations],
        "categories": [{"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}],
    }
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))


def rectangle(left: int, top: int, right: int, bottom: int) -> list[list[float]]:
    return [[left, top, right, top, right, bottom, left, bottom]]


def test_coco_drops_crowds_and_ignores_overlaps(tmp_path: Path) -> None:
    runs = np.zeros((20, 30), bool)
    runs[15:18, 2:6] = True
    flat = runs.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat.astype(int))) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    write_coco(
        tmp_path,
        [
            {"category_id": 1, "segmentation": rectangle(2, 2, 12, 10), "iscrowd": 0},
            {"category_id": 90, "segmentation": rectangle(8, 4, 20, 12), "iscrowd": 0},
            {"category_id": 1, "segmentation": {"counts": counts, "size": [20, 30]}, "iscrowd": 0},
            {"category_id": 1, "segmentation": {"counts": [0, 600], "size": [20, 30]}, "iscrowd": 1},
        ],
    )
    (sample,) = samples_of(coco.open_source("coco", request(tmp_path, tmp_path))["val"])
    instances, classes = decode_mask(sample.parts["instances.png"]), decode_mask(sample.parts["classes.png"])
    expected = np.zeros((20, 30), int)
    expected[2:10, 2:12], expected[4:12, 8:20], expected[4:10, 8:12], expected[15:18, 2:6] = 1, 2, 255, 3
    np.testing.assert_array_equal(instances, expected)
    np.testing.assert_array_equal(classes, np.select([expected == 2, expected == 255, expected > 0], [90, 255, 1], 0))


def test_compressed_run_lengths_are_those_of_pycocotools() -> None:
    from pycocotools import mask

    draw = np.random.default_rng(0)
    for density in (0.02, 0.5, 0.98, 0.0, 1.0):
        picture = draw.random((37, 23)) < density
        picture[5:20, 3:9] = density > 0.1
        encoded = mask.encode(np.asfortranarray(picture.astype(np.uint8)))
        segmentation = {"counts": encoded["counts"].decode(), "size": [37, 23]}
        instances, _ = coco.label_maps(37, 23, [(5, segmentation)])
        np.testing.assert_array_equal(instances > 0, picture)


@pytest.mark.parametrize(
    "segmentation",
    [[[1, 2, 3]], [[0, 0, 1e12, 0, 5, 5]], [[float("nan")] * 6], "text", {"counts": [5], "size": [20, 30]}, None,
     {"counts": "\x7f" * 50, "size": [20, 30]}, {"counts": [-5, 605], "size": [20, 30]},
     {"counts": [600], "size": [9, 9]}],
)  # fmt: skip
def test_damaged_segmentations_make_a_broken_picture(tmp_path: Path, segmentation: object) -> None:
    write_coco(tmp_path, [{"category_id": 1, "segmentation": segmentation, "iscrowd": 0}])
    source = coco.open_source("coco", request(tmp_path, tmp_path))["val"]
    (found,) = source.read(np.arange(1))
    assert isinstance(found, Broken)
    assert "segmentation" in found.reason


@pytest.mark.skipif(not (SHARED / "data" / "tiny_coco.tar").exists(), reason="no COCO images here")
def test_real_coco_masks_equal_pycocotools_own(tmp_path: Path) -> None:
    from pycocotools import mask

    place = SHARED / "data" / "tiny_coco.tar"
    sources = coco.open_source("coco", request(place, tmp_path))
    assert {split: len(source) for split, source in sources.items()} == {"train": 50, "val": 50}
    with tarfile.open(place) as tar:
        member = tar.extractfile("tiny_coco/annotations/instances_val2017.json")
        assert member is not None
        content = json.load(member)
    size = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    names = {image["file_name"]: image["id"] for image in content["images"]}
    source = sources["val"]
    for number in range(0, 50, 5):
        (sample,) = source.read(np.array([number]))
        assert isinstance(sample, Sample)
        identity = names[source.name_of(number).rsplit("/", 1)[-1]]
        total = np.zeros(size[identity], int)
        for entry in content["annotations"]:
            if entry["image_id"] == identity and not entry["iscrowd"]:
                total += mask.decode(mask.merge(mask.frPyObjects(entry["segmentation"], *size[identity])))
        labels = decode_mask(sample.parts["instances.png"])
        np.testing.assert_array_equal(labels == 255, total > 1)
        np.testing.assert_array_equal((labels > 0) & (labels < 255), total == 1)
        assert decode_image(sample.parts["jpg"]).shape[:2] == labels.shape


@pytest.mark.parametrize("variant", ["full", "outd", "camo"])
def test_clevrtex_is_cut_and_split_as_published(tmp_path: Path, variant: str) -> None:
    root = tmp_path / f"clevrtex_{variant}" / "0"
    root.mkdir(parents=True)
    labels = np.zeros((240, 320), np.uint8)
    labels[100:140, 140:200] = 3
    for number in range(10):
        picture = photo(number, 240, 320)
        (root / f"CLEVRTEX_{variant}_{number:06d}.png").write_bytes(encode_png(picture))
        (root / f"CLEVRTEX_{variant}_{number:06d}_flat.png").write_bytes(encode_png(labels))
    ask = request(tmp_path, tmp_path)
    sources = clevrtex.open_source(f"clevrtex-{variant}", ask)
    assert re.match("10 pictures, the whole set has [125]0,000: with all its archives", ask.notes[0])
    sizes = {split: len(source) for split, source in sources.items()}
    assert sizes == ({"test": 10} if variant == "outd" else {"test": 1, "val": 1, "train": 8})
    sample = samples_of(sources["test"])[0]
    cut = Image.fromarray(photo(0, 240, 320)).crop((64, 24, 256, 216))
    np.testing.assert_array_equal(
        decode_image(sample.parts["png"]), np.array(cut.resize((128, 128), Image.Resampling.BILINEAR))
    )
    mask = decode_mask(sample.parts["instances.png"])
    assert mask.shape == (128, 128)
    assert set(np.unique(mask)) == {0, 3}
    assert abs((mask == 3).mean() - 40 * 60 / 192**2) < 0.004
    raw = clevrtex.open_source(f"clevrtex-{variant}", request(tmp_path, tmp_path, raw=True))
    np.testing.assert_array_equal(decode_mask(samples_of(raw["test"])[0].parts["instances.png"]), labels)
    with pytest.raises(UserError, match=r"looked for CLEVRTEX_"):
        clevrtex.open_source("clevrtex-full" if variant != "full" else "clevrtex-camo", request(tmp_path, tmp_path))
