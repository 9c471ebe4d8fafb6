"""CIFAR-10: its pickles read without unpickling, its tree of files."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from source_inputs import SHARED, Evil, request, samples_of, tar_of
from test_make_shards import image_folder, photo

from configs.errors import UserError
from pretrain.data.decode import decode_image
from pretrain.data.sources import cifar10
from pretrain.data.sources.pickled import PickleRefusedError, load_plain
from pretrain.data.sources.picture import encode_jpeg


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
