"""Sources of images: each on a small input in its original format, written here."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_make_shards import image_folder, photo
from test_tar import archive

from configs.errors import UserError
from pretrain.data.decode import decode_image, decode_mask
from pretrain.data.sources import cifar10, clevrtex, coco, existing, folder, imagenet, npz, voc
from pretrain.data.sources.pickled import PickleRefusedError, load_plain
from pretrain.data.sources.picture import encode_jpeg, encode_labels, encode_png, image_part, kind_of
from pretrain.data.sources.sample import Broken, Request, Sample, key_of
from pretrain.data.sources.tree import Names, open_tree

SHARED = Path(os.environ.get("AKORN_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def request(path: Path, tmp_path: Path, **more: Any) -> Request:
    return Request(path, tmp_path / "temporary", **more)


def samples_of(source: Any) -> list[Sample]:
    found = list(pickle.loads(pickle.dumps(source)).read(np.arange(len(source))))
    assert all(isinstance(sample, Sample) for sample in found)
    return found


def tar_of(folder_: Path, mode: str, path: Path) -> Path:
    with tarfile.open(path, mode) as tar:
        tar.add(folder_, arcname=folder_.name)
    return path


# folder and trees


def test_a_folder_a_tar_and_a_zip_are_the_same_source(tmp_path: Path) -> None:
    images = image_folder(tmp_path / "pets", per_class=2)
    (images / ".hidden.jpg").write_bytes(b"no")
    (images / "notes.txt").write_text("no image")
    packed = [tar_of(images, f"w:{form}", tmp_path / f"pets.tar.{form}") for form in ("", "gz", "xz", "bz2")]
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive_:
        for path in sorted(images.rglob("*.JPEG")):
            archive_.write(path, f"pets/{path.relative_to(images)}")
    expected = None
    for place in (images, *packed, tmp_path / "pets.zip"):
        sources = folder.open_source("folder", request(place, tmp_path))
        assert list(sources) == [""]
        assert sources[""].classes == ["cat", "dog", "owl"]
        parts = [sample.parts for sample in samples_of(sources[""])]
        expected = expected or parts
        assert parts == expected
    assert expected is not None
    assert [part["cls"] for part in expected] == [b"0", b"0", b"1", b"1", b"2", b"2"]


def test_splits_flat_and_mixed_folders(tmp_path: Path) -> None:
    image_folder(tmp_path / "in" / "train", per_class=1)
    image_folder(tmp_path / "in" / "validation", per_class=1)
    sources = folder.open_source("folder", request(tmp_path / "in", tmp_path))
    assert {split: len(source) for split, source in sources.items()} == {"train": 3, "val": 3}
    assert sources["val"].classes == ["cat", "dog", "owl"]
    for path in (tmp_path / "in" / "validation" / "cat").iterdir():
        path.unlink()
    sources = folder.open_source("folder", request(tmp_path / "in", tmp_path))
    assert [sample.parts["cls"] for sample in samples_of(sources["val"])] == [b"1", b"2"]
    flat = tmp_path / "flat"
    flat.mkdir()
    for number in range(3):
        (flat / f"{number}.png").write_bytes(encode_png(photo(number)))
    assert all("cls" not in sample.parts for sample in samples_of(folder.open_source("f", request(flat, tmp_path))[""]))
    image_folder(flat / "more", per_class=1)
    ask = request(flat, tmp_path)
    assert folder.open_source("f", ask)[""].labels is None
    assert "no labels are written" in ask.notes[0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images in"):
        folder.open_source("f", request(tmp_path / "empty", tmp_path))


def test_hostile_archives_stay_inside_and_garbage_is_told(tmp_path: Path) -> None:
    image = encode_png(photo(0))
    (tmp_path / "bad.tar").write_bytes(archive([("../x.png", image), ("/y.png", image), ("z.png", image)], extra=["2"]))
    ask = request(tmp_path / "bad.tar", tmp_path)
    assert len(folder.open_source("f", ask)[""]) == 1
    assert len(ask.notes) == 3
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive_:
        archive_.writestr("../../x.png", image)
        archive_.writestr("z.png", image)
    assert len(folder.open_source("f", request(tmp_path / "bad.zip", tmp_path))[""]) == 1
    for name, content in {
        "a.tar": b"garbage" * 99,
        "b.tar.gz": b"\x1f\x8bgarbage",
        "c.zip": b"PK\x03\x04garbage",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="cannot be"):
            folder.open_source("f", request(tmp_path / name, tmp_path))


def test_a_link_to_a_folder_above_does_not_loop(tmp_path: Path) -> None:
    images = image_folder(tmp_path / "in", per_class=1)
    (images / "cat" / "loop").symlink_to(images)
    assert len(open_tree(images, tmp_path).names) == 3


def test_names_are_kept_in_two_arrays() -> None:
    names = ["", "a", "b/c.jpg", "d\udcff"]
    kept = pickle.loads(pickle.dumps(Names(names)))
    assert list(kept) == names
    assert kept[-1] == "d\udcff"
    assert kept[1:3] == ["a", "b/c.jpg"]


# pictures


def test_formats_are_told_by_content_and_odd_ones_become_png() -> None:
    pixels = photo(3)
    for form, kind in {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": None, "TIFF": None, "GIF": None}.items():
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, form)
        assert kind_of(buffer.getvalue()) == kind
        name, content = next(iter(image_part(buffer.getvalue()).items()))
        assert name == (kind or "png")
        assert decode_image(content).shape == pixels.shape


def test_label_maps_take_sixteen_bits_only_when_needed() -> None:
    small, large = np.array([[0, 7, 65535]]), np.array([[0, 300, 65535]])
    np.testing.assert_array_equal(decode_mask(encode_labels(small)), [[0, 7, 255]])
    np.testing.assert_array_equal(decode_mask(encode_labels(large)), large)


def test_keys_are_fit_for_tars() -> None:
    key = key_of(12, "dir.with.dots/a picture (1) " + "x" * 200)
    assert key.isascii()
    assert "." not in key
    assert len(key) <= 75


# CIFAR-10


def python2_pickle(labels: list[int], data: np.ndarray, names: list[str]) -> bytes:
    """A batch as Python 2's cPickle wrote it (protocol 2): byte strings without Python 3's detour."""

    def text(value: bytes) -> bytes:
        return (
            b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + len(value).to_bytes(4, "little") + value
        )

    def integers(values: list[int]) -> bytes:
        return b"](" + b"".join(b"K" + bytes([value]) for value in values) + b"e"

    rows = len(data).to_bytes(2, "little")
    shape = b"M" + rows + b"M" + (3072).to_bytes(2, "little") + b"\x86"
    dtype = (
        b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        + b"(K\x01" + shape + dtype + b"\x89" + text(data.tobytes()) + b"tb"
    )  # fmt: skip
    listed = b"](" + b"".join(text(name.encode()) for name in names) + b"e"
    items = text(b"batch_label") + text(b"batch 1 of 5") + text(b"labels") + integers(labels)
    return b"\x80\x02}(" + items + text(b"data") + array + text(b"filenames") + listed + b"u."


def cifar_batches(per_batch: int = 3) -> dict[str, tuple[list[int], np.ndarray, list[str]]]:
    draw = np.random.default_rng(0)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    return {
        name: (
            [(number + at) % 10 for at in range(per_batch)],
            draw.integers(0, 256, (per_batch, 3072), np.uint8),
            [f"img_{number}_{at}.png" for at in range(per_batch)],
        )
        for number, name in enumerate(names)
    }


def test_python_2_pickles_are_those_that_pickle_reads() -> None:
    batch = cifar_batches()["test_batch"]
    content = python2_pickle(*batch)
    theirs = pickle.loads(content, encoding="bytes")
    ours = load_plain(content)
    np.testing.assert_array_equal(ours["data"], theirs[b"data"])
    assert ours["labels"] == theirs[b"labels"]
    assert ours["filenames"] == theirs[b"filenames"]


@pytest.mark.parametrize("protocol", [1, 2, 3, 4])
def test_pickles_of_other_protocols(protocol: int) -> None:
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    found = load_plain(pickle.dumps({b"data": array, b"labels": [1, 2], "x": None}, protocol=protocol))
    np.testing.assert_array_equal(found["data"], array)
    assert found["labels"] == [1, 2]


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/evil-was-here",)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"data": Evil()}),
        pickle.dumps(np.array([Evil()], object)),
        b"\x80\x02.",
        b"",
        b"}u.",
        b"cos\nsystem\n.",
    ],
)
def test_a_pickle_that_wants_anything_else_is_refused(content: bytes) -> None:
    with pytest.raises(PickleRefusedError):
        load_plain(content)
    assert not Path("/tmp/evil-was-here").exists()


@pytest.mark.parametrize("packed", [True, False])
def test_cifar10_from_its_python_archive(tmp_path: Path, packed: bool) -> None:
    batches = cifar_batches()
    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    for name, batch in batches.items():
        (root / name).write_bytes(python2_pickle(*batch))
    (root / "readme.html").write_text("x")
    place = tar_of(root, "w:gz", tmp_path / "cifar-10-python.tar.gz") if packed else root
    sources = cifar10.open_source("cifar10", request(place, tmp_path))
    assert {split: len(source) for split, source in sources.items()} == {"train": 15, "test": 3}
    for sample, label, row in zip(samples_of(sources["test"]), *batches["test_batch"][:2]):
        assert sample.parts["cls"] == str(label).encode()
        np.testing.assert_array_equal(decode_image(sample.parts["png"]), row.reshape(3, 32, 32).transpose(1, 2, 0))


def test_cifar10_from_a_tree_and_from_neither(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in cifar10.CLASSES:
            (tmp_path / "in" / split / name).mkdir(parents=True)
            (tmp_path / "in" / split / name / "0000.jpg").write_bytes(encode_jpeg(photo(len(name), 32, 32)))
    sources = cifar10.open_source("cifar10", request(tmp_path / "in", tmp_path))
    assert [sample.parts["cls"] for sample in samples_of(sources["train"])] == [str(n).encode() for n in range(10)]
    with pytest.raises(UserError, match="no CIFAR-10"):
        cifar10.open_source("cifar10", request(image_folder(tmp_path / "pets"), tmp_path))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "test_batch").write_bytes(pickle.dumps({"data": Evil()}))
    with pytest.raises(UserError, match=r"wants posix.system from Python"):
        cifar10.open_source("cifar10", request(tmp_path / "bad", tmp_path))


@pytest.mark.skipif(not (SHARED / "data" / "cifar10-jpeg.tar.xz").exists(), reason="no CIFAR-10 here")
@pytest.mark.slow
def test_the_real_cifar10_tree(tmp_path: Path) -> None:
    sources = cifar10.open_source("cifar10", request(SHARED / "data" / "cifar10-jpeg.tar.xz", tmp_path))
    assert {split: len(source) for split, source in sources.items()} == {"train": 50_000, "test": 10_000}


# ImageNet


def synset_images() -> dict[str, dict[str, bytes]]:
    return {
        synset: {f"{synset}_{number}.JPEG": encode_jpeg(photo(7 * at + number)) for number in range(2)}
        for at, synset in enumerate(("n01440764", "n01443537", "n02119789"))
    }


def development_kit(path: Path, truth: list[int]) -> None:
    """meta.mat as in the real kit: leaves 1 to 3 out of the order of their names, and an inner node."""
    from scipy.io import savemat

    rows = [
        (1, "n02119789", "fox", "", 0),
        (2, "n01440764", "tench", "", 0),
        (3, "n01443537", "fish", "", 0),
        (1001, "n00001740", "entity", "", 3),
    ]
    kinds = [
        ("ILSVRC2012_ID", object),
        ("WNID", object),
        ("words", object),
        ("gloss", object),
        ("num_children", object),
    ]
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, dtype=kinds).reshape(-1, 1)})
    files = [
        ("ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue()),
        (
            "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt",
            "".join(f"{t}\n" for t in truth).encode(),
        ),
    ]
    import gzip

    path.write_bytes(gzip.compress(archive(files)))


def test_imagenet_as_downloaded(tmp_path: Path) -> None:
    images = synset_images()
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(
        archive([(f"{synset}.tar", archive(list(files.items()))) for synset, files in images.items()])
    )
    val = [(f"ILSVRC2012_val_{number:08d}.JPEG", encode_jpeg(photo(90 + number))) for number in range(1, 5)]
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(archive(val))
    with pytest.raises(UserError, match=r"put ILSVRC2012_devkit_t12\.tar\.gz"):
        imagenet.open_source("imagenet", request(tmp_path, tmp_path))
    development_kit(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", [1, 3, 2, 1])
    sources = imagenet.open_source("imagenet", request(tmp_path, tmp_path))
    train, held_out = samples_of(sources["train"]), samples_of(sources["val"])
    assert [sample.parts["cls"] for sample in train] == [b"0", b"0", b"1", b"1", b"2", b"2"]
    assert train[3].parts["jpg"] == images["n01443537"]["n01443537_1.JPEG"]
    assert [sample.parts["cls"] for sample in held_out] == [b"2", b"1", b"0", b"2"]
    assert held_out[2].parts["jpg"] == val[2][1]


@pytest.mark.parametrize("kaggle", [True, False])
def test_imagenet_unpacked(tmp_path: Path, kaggle: bool) -> None:
    root = tmp_path / "ILSVRC" / "Data" / "CLS-LOC" if kaggle else tmp_path
    for synset, files in synset_images().items():
        (root / "train" / synset).mkdir(parents=True)
        (root / "val" / ("" if kaggle else synset)).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (root / "train" / synset / name).write_bytes(content)
    if kaggle:
        (root / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(encode_jpeg(photo(1)))
        (tmp_path / "LOC_val_solution.csv").write_text(
            "ImageId,PredictionString\nILSVRC2012_val_00000001,n01443537 1 2 3 4 \n"
        )
    else:
        (root / "val" / "n01443537" / "ILSVRC2012_val_00000001.JPEG").write_bytes(encode_jpeg(photo(1)))
    sources = imagenet.open_source("imagenet", request(tmp_path, tmp_path))
    assert [sample.parts["cls"] for sample in samples_of(sources["train"])] == [b"0", b"0", b"1", b"1", b"2", b"2"]
    assert [sources["val"].classes[int(sample.parts["cls"])] for sample in samples_of(sources["val"])] == ["n01443537"]
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no ImageNet in"):
        imagenet.open_source("imagenet", request(tmp_path / "none", tmp_path))


# masks


def test_voc_keeps_its_palette_masks(tmp_path: Path) -> None:
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for name in ("JPEGImages", "SegmentationObject", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    labels = np.zeros((40, 60), np.uint8)
    labels[5:20, 5:20], labels[20:30, 20:30], labels[4, :] = 1, 2, 255
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
    sources = clevrtex.open_source(f"clevrtex-{variant}", request(tmp_path, tmp_path))
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


@pytest.mark.parametrize("layout", ["NHWC bytes", "NCHW floats", "NHW"])
def test_npz_files_of_several_layouts(tmp_path: Path, layout: str) -> None:
    pictures = np.stack([photo(number, 40, 40) for number in range(3)])
    labels = np.random.default_rng(0).integers(-1, 5, (3, 40, 40))
    images = {
        "NHWC bytes": pictures,
        "NCHW floats": (pictures.transpose(0, 3, 1, 2) / 255).astype(np.float32),
        "NHW": pictures[..., 0],
    }[layout]
    np.savez_compressed(tmp_path / "shapes_train.npz", images=images, labels=labels)
    source = npz.open_source("npz", request(tmp_path, tmp_path))["train"]
    for number, sample in enumerate(samples_of(source)):
        expected = pictures[number] if layout != "NHW" else np.repeat(pictures[number, ..., :1], 3, axis=2)
        np.testing.assert_array_equal(decode_image(sample.parts["png"]), expected)
        mask = decode_mask(sample.parts["instances.png"])
        np.testing.assert_array_equal(mask, np.where(labels[number] < 0, 255, labels[number]))


def test_npz_files_that_want_unpickling_or_hold_no_images_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "evil.npz", images=np.array([Evil()], object))
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    np.savez(tmp_path / "shape.npz", images=np.zeros((3, 4)))
    (tmp_path / "garbage.npz").write_bytes(b"PK\x03\x04garbage")
    for name in ("evil", "other", "shape", "garbage"):
        with pytest.raises(UserError, match="cannot be used"):
            npz.open_source("npz", request(tmp_path / f"{name}.npz", tmp_path))


def test_existing_shards_are_written_anew(tmp_path: Path) -> None:
    image = encode_png(photo(1))
    files = [("1.jpeg", image), ("1.label", b"4"), ("2.txt", b"no image"), ("3.png", image)]
    (tmp_path / "foreign.tar").write_bytes(archive(files))
    source = existing.open_source("shards", request(tmp_path, tmp_path))[""]
    found = list(source.read(np.arange(3)))
    assert isinstance(found[0], Sample)
    assert found[0].parts == {"png": image, "cls": b"4"}
    assert isinstance(found[1], Broken)
    assert isinstance(found[2], Sample)
