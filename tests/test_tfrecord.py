"""TFRecords written by TensorBoard's own writer, and the multi-object datasets in their original form."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c as reference_crc32c
from test_sources import request, samples_of

from configs.errors import UserError
from pretrain.data.decode import decode_image, decode_mask
from pretrain.data.sources import multiobject
from pretrain.data.sources.tfrecord import RecordError, example, masked_crc32c, records


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def message(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def encoded_example(features: dict[str, np.ndarray | list[bytes] | list[int]]) -> bytes:
    """A tf.train.Example by the definition of its protocol buffer."""
    entries = b""
    for name, values in features.items():
        if isinstance(values, np.ndarray) and values.dtype == np.uint8:  # one string for each byte, as the datasets do
            triples = np.full((values.size, 3), [0x0A, 1, 0], np.uint8)
            triples[:, 2] = values.reshape(-1)
            feature = message(1, triples.tobytes())
        elif isinstance(values, np.ndarray):
            feature = message(2, message(1, values.astype("<f4").tobytes()))
        elif all(isinstance(value, bytes) for value in values):
            feature = message(1, b"".join(message(1, value) for value in values))  # type: ignore[arg-type]
        else:
            feature = message(3, message(1, b"".join(varint(value & (2**64 - 1)) for value in values)))  # type: ignore[operator]
        entries += message(1, message(1, name.encode()) + message(2, feature))
    return message(1, entries)


def framed(data: bytes) -> bytes:
    head = len(data).to_bytes(8, "little")
    checksum = reference_crc32c(data) if len(data) < 10_000 else 0  # slow, and not what tells garbage
    return head + reference_crc32c(head).to_bytes(4, "little") + data + checksum.to_bytes(4, "little")


def test_checksums_are_those_of_tensorboard() -> None:
    for content in (b"", b"\0" * 8, bytes(range(200))):
        assert masked_crc32c(content) == reference_crc32c(content)


def test_examples_of_all_kinds(tmp_path: Path) -> None:
    content = encoded_example(
        {
            "f": np.array([1.5, -2.0], np.float32),
            "b": [b"abc", b""],
            "i": [1, -7, 2**40],
            "u": np.arange(9, dtype=np.uint8),
        }
    )
    found = example(content)
    assert found["b"] == [b"abc", b""]
    np.testing.assert_array_equal(found["f"], np.array([1.5, -2.0], np.float32))
    np.testing.assert_array_equal(found["i"], [1, -7, 2**40])
    np.testing.assert_array_equal(found["u"], np.arange(9))


def test_protobuf_itself_agrees(tmp_path: Path) -> None:
    from tensorboard.compat.proto import summary_pb2

    summary = summary_pb2.Summary.Image(height=3, width=70000, colorspace=2, encoded_image_string=b"xyz")
    from pretrain.data.sources.tfrecord import _fields

    fields = dict(_fields(memoryview(summary.SerializeToString())))
    assert (fields[1], fields[2], fields[3]) == (3, 70000, 2)
    assert bytes(fields[4]) == b"xyz"  # type: ignore[arg-type]


def test_records_plain_and_zipped_and_damaged(tmp_path: Path) -> None:
    content = framed(b"one") + framed(b"") + framed(b"three" * 1000)
    (tmp_path / "plain").write_bytes(content)
    (tmp_path / "zipped").write_bytes(gzip.compress(content))
    assert list(records(tmp_path / "plain")) == list(records(tmp_path / "zipped")) == [b"one", b"", b"three" * 1000]
    for damaged in (content[:-1], content[:20], b"\1" + content, gzip.compress(content)[:-20], b"\x1f\x8bxx"):
        (tmp_path / "bad").write_bytes(damaged)
        with pytest.raises(RecordError):
            list(records(tmp_path / "bad"))


def scene(form: multiobject.Form, number: int, objects: int) -> tuple[bytes, np.ndarray, np.ndarray]:
    """A record of the datasets' form: image, masks of 0 and 255 with the background first, visibility."""
    draw = np.random.default_rng(number)
    image = draw.integers(0, 256, (form.height, form.width, 3), np.uint8)
    labels = np.zeros((form.height, form.width), np.uint8)
    for label in range(1, objects + 1):
        top, left = draw.integers(0, form.height - 8), draw.integers(0, form.width - 8)
        labels[top : top + 8, left : left + 8] = label
    mask = np.stack([(labels == entity) * 255 for entity in range(form.entities)]).astype(np.uint8)
    visible = (np.arange(form.entities) <= objects).astype(np.float32)
    return (
        encoded_example({"image": image, "mask": mask, "visibility": visible, "x": np.zeros(4, np.float32)}),
        image,
        labels,
    )


def write_records(path: Path, form: multiobject.Form, objects: list[int]) -> list[tuple[bytes, np.ndarray, np.ndarray]]:
    scenes = [scene(form, number, count) for number, count in enumerate(objects)]
    path.write_bytes(gzip.compress(b"".join(framed(content) for content, _, _ in scenes), 1))
    return scenes


def test_tetrominoes_are_cut_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = multiobject.Form(35, 35, 4, train=3)
    monkeypatch.setitem(multiobject.FORMS, "tetrominoes-records", form)
    monkeypatch.setattr(multiobject, "TEST", 2)
    path = tmp_path / "tetrominoes_train.tfrecords"
    scenes = write_records(path, form, [3] * 6)
    sources = multiobject.open_source("tetrominoes-records", request(path, tmp_path))
    assert {split: len(source) for split, source in sources.items()} == {"train": 3, "test": 2}
    for number, sample in enumerate([*samples_of(sources["train"]), *samples_of(sources["test"])]):
        np.testing.assert_array_equal(decode_image(sample.parts["png"]), scenes[number][1][1:33, 1:33])
        np.testing.assert_array_equal(decode_mask(sample.parts["instances.png"]), scenes[number][2][1:33, 1:33])
    raw = multiobject.open_source("tetrominoes-records", request(path, tmp_path, raw=True, count=2))
    assert len(raw["train"]) == 2
    assert decode_image(samples_of(raw["train"])[0].parts["png"]).shape == (35, 35, 3)


def test_masks_of_multi_dsprites_have_the_entities_last(tmp_path: Path) -> None:
    """Its own reader declares them [64, 64, 6, 1] and transposes, unlike those of the other datasets."""
    draw = np.random.default_rng(0)
    labels, image = draw.integers(0, 6, (64, 64)), draw.integers(0, 256, (64, 64, 3), np.uint8)
    mask = ((labels[..., None] == np.arange(6)) * 255).astype(np.uint8)
    path = tmp_path / "multi_dsprites_colored_on_grayscale.tfrecords"
    path.write_bytes(gzip.compress(framed(encoded_example({"image": image, "mask": mask}))))
    (sample,) = samples_of(multiobject.open_source("multi-dsprites-records", request(path, tmp_path))["train"])
    np.testing.assert_array_equal(decode_mask(sample.parts["instances.png"]), labels)
    np.testing.assert_array_equal(decode_image(sample.parts["png"]), image)


def test_clevr6_has_at_most_six_objects_and_128_pixels(tmp_path: Path) -> None:
    form = multiobject.FORMS["clevr6-records"]
    path = tmp_path / "clevr_with_masks_train.tfrecords"
    scenes = write_records(path, form, [6, 7, 2])
    ask = request(path, tmp_path)
    sources = multiobject.open_source("clevr6-records", ask)
    assert list(sources) == ["train"]
    assert "no test split" in ask.notes[0]
    found = samples_of(sources["train"])
    assert [sample.key[-10:] for sample in found] == ["0000000000", "0000000002"]
    mask = decode_mask(found[1].parts["instances.png"])
    for content, stored in ((decode_image(found[1].parts["png"]), scenes[2][1]), (mask, scenes[2][2])):
        cut = Image.fromarray(stored[29:221, 64:256]).resize((128, 128), Image.Resampling.NEAREST)
        np.testing.assert_array_equal(content, np.array(cut))


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"garbage" * 100)
    with pytest.raises(UserError, match=r"no TFRecord file of tetrominoes \(record 0 has no valid head\)"):
        multiobject.open_source("tetrominoes-records", request(tmp_path / "bad", tmp_path))
    (tmp_path / "other").write_bytes(framed(encoded_example({"image": [b"12"]})))
    with pytest.raises(UserError, match=r"feature 'image' is not 35 x 35 x 3 bytes"):
        multiobject.open_source("tetrominoes-records", request(tmp_path / "other", tmp_path))
