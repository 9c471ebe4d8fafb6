"""Sources of images without labels of their own form: folders, archives, arrays, shards; pictures and keys."""

from __future__ import annotations

import io
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from source_inputs import Evil, request, samples_of, tar_of
from test_make_shards import image_folder, photo
from test_tar import archive

from configs.errors import UserError
from pretrain.data.decode import decode_image, decode_mask
from pretrain.data.sources import existing, folder, npz
from pretrain.data.sources.picture import encode_labels, encode_png, image_part, kind_of
from pretrain.data.sources.sample import Broken, Sample, key_of
from pretrain.data.sources.tree import Names, open_tree


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


def test_npz_files_of_64_bit_floats_need_little_more_memory_than_they_have(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (300, 3, 64, 64), np.uint8)
    np.savez(tmp_path / "dsprites_train.npz", images=pictures / 255, labels=np.zeros((300, 64, 64), np.uint8))
    tracemalloc.start()
    source = npz.open_source("npz", request(tmp_path, tmp_path))["train"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(source.images, pictures.transpose(0, 2, 3, 1))
    assert peak < 1.5 * 8 * pictures.size


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.1, 256.0])
def test_npz_files_of_other_numbers_are_refused(tmp_path: Path, value: float) -> None:
    np.savez(tmp_path / "odd.npz", images=np.full((2, 4, 4), value))
    with pytest.raises(UserError, match="images must be bytes, or numbers in"):
        npz.open_source("npz", request(tmp_path / "odd.npz", tmp_path))


def test_npz_files_that_want_unpickling_or_hold_no_images_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "evil.npz", images=np.array([Evil()], object))
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    np.savez(tmp_path / "shape.npz", images=np.zeros((3, 4)))
    (tmp_path / "garbage.npz").write_bytes(b"PK\x03\x04garbage")
    np.save((tmp_path / "array.npz").open("wb"), np.zeros(3))
    for name in ("evil", "other", "shape", "garbage", "array"):
        with pytest.raises(UserError, match="cannot be used") as caught:
            npz.open_source("npz", request(tmp_path / f"{name}.npz", tmp_path))
        assert "pickle.load" not in str(caught.value)  # numpy's advice


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


@pytest.mark.parametrize("at", [8, 10], ids=["encrypted", "compression"])
def test_npz_files_that_zipfile_cannot_read_are_refused(tmp_path: Path, at: int) -> None:
    """A flag or a method, in the local header and in the directory, that stands for what is not supported."""
    np.savez(tmp_path / "odd.npz", images=np.zeros((2, 4, 4, 3), np.uint8))
    content = bytearray((tmp_path / "odd.npz").read_bytes())
    directory = content.index(b"PK\x01\x02")
    content[at - 2] |= 1 if at == 8 else 97
    content[directory + at] |= 1 if at == 8 else 97
    (tmp_path / "odd.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"odd\.npz cannot be used"):
        npz.open_source("npz", request(tmp_path / "odd.npz", tmp_path))
