"""The command make_shards.py: whole sets through its entry point, interruption, broken images, --verify."""

from __future__ import annotations

import errno
import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.data.readers.reader_wds import ReaderWds

from cluster.preflight import shards_check
from configs.errors import UserError
from pretrain.data import making
from pretrain.data.decode import decode_image, decode_mask
from pretrain.data.index import ShardIndex
from pretrain.data.scenes import SCENES
from pretrain.data.shards import ShardReader, ShardWriter
from pretrain.data.sources.picture import encode_jpeg, encode_png
from pretrain.make_shards import KINDS, main


def photo(seed: int, height: int = 40, width: int = 60) -> np.ndarray:
    """A smooth random picture, uint8 [H, W, 3]."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def image_folder(folder: Path, per_class: int = 6) -> Path:
    for label, name in enumerate(("cat", "dog", "owl")):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            content = encode_jpeg(photo(100 * label + number, 40, 60 + number))
            (folder / name / f"{number}.v1.JPEG").write_bytes(content)
    return folder


def huge_png() -> bytes:
    """A header that promises 60,000 x 60,000 pixels, and next to no data."""
    head = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    chunks = [(13, head), (4, b"IDATdata")]
    packed = [length.to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") for length, chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_generated_scenes_hold_the_scenes_shuffled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "set"
    arguments = ["tetrominoes", str(out), "--count", "50", "--per-shard", "16", "--seed", "5", "--workers", "1"]
    assert main(arguments) == 0
    assert "50 samples in 4 shards" in capsys.readouterr().out
    index = ShardIndex.open(out)
    reader = ShardReader(index)
    numbers = [int(key) for key in index.keys(range(50))]
    assert sorted(numbers) == list(range(50))
    assert numbers != sorted(numbers)
    images, masks = SCENES["tetrominoes"](5, np.array(numbers))
    for sample in range(50):
        parts = reader.read(sample)
        np.testing.assert_array_equal(decode_image(parts["png"]), images[sample])
        np.testing.assert_array_equal(decode_mask(parts["instances.png"]), masks[sample])
    assert sorted(name for name in os.listdir(out) if not name.endswith(".tar")) == [
        "broken.jsonl",
        "index.json",
        "index.safetensors",
        "info.json",
    ]
    assert main(arguments) == 0
    assert "was there already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"made otherwise \(seed: 5 -> 6\)"):
        main([*arguments[:-4], "--seed", "6"])
    assert main(["--verify", str(out)]) == 0


def test_processes_write_the_same_bytes_as_one(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "in")
    for name, workers in (("one", "1"), ("three", "3")):
        main(["folder", str(source), str(tmp_path / name), "--per-shard", "5", "--workers", workers])
    prints = {ShardIndex.open(tmp_path / name).fingerprint for name in ("one", "three")}
    assert len(prints) == 1


def test_an_interrupted_command_goes_on_and_gives_the_same_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = image_folder(tmp_path / "in")

    def arguments(out: str, *more: str) -> list[str]:
        return ["folder", str(source), str(tmp_path / out), "--per-shard", "4", "--workers", "1", *more]

    main(arguments("whole"))
    written: list[int] = []
    write_shard = making.write_shard

    def stopping(*args: object) -> tuple[int, int]:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(args[-1])  # type: ignore[arg-type]
        return write_shard(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(making, "write_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        main(arguments("cut"))
    with pytest.raises(UserError, match="unfinished shard set with other settings"):
        main(arguments("cut", "--resize", "32"))
    with pytest.raises(UserError, match="is not finished"):  # nor is a part trained on, or found whole
        main(["--verify", str(tmp_path / "cut")])
    assert "not finished" in shards_check("data.shards", str(tmp_path / "cut")).text
    monkeypatch.setattr(making, "write_shard", lambda *args: (written.append(args[-1]), write_shard(*args))[1])
    main(arguments("cut"))
    assert written == [0, 1, 2, 3, 4]
    assert ShardIndex.open(tmp_path / "cut").fingerprint == ShardIndex.open(tmp_path / "whole").fingerprint


def test_labels_classes_and_names_of_a_folder(tmp_path: Path) -> None:
    main(["folder", str(image_folder(tmp_path / "in")), str(tmp_path / "out"), "--workers", "1"])
    index = ShardIndex.open(tmp_path / "out")
    info = json.loads((tmp_path / "out" / "info.json").read_text())
    assert info["classes"] == ["cat", "dog", "owl"]
    reader = ShardReader(index)
    for sample in range(len(index)):
        name = info["classes"][int(reader.read(sample)["cls"])]
        number = index.keys([sample])[0].split(f"_{name}-")[1][0]
        original = (tmp_path / "in" / name / f"{number}.v1.JPEG").read_bytes()
        assert reader.read(sample)["jpg"] == original
        assert index.label(sample) == info["classes"].index(name)


def test_timm_reads_our_sets(tmp_path: Path) -> None:
    main(["folder", str(image_folder(tmp_path / "in")), str(tmp_path / "out"), "--workers", "1", "--per-shard", "5"])
    reader = ReaderWds(str(tmp_path / "out"), name="", split="train", is_training=False)
    assert reader.num_samples == 18
    samples = list(reader)
    assert len(samples) == 18
    assert sorted(int(target) for _, target in samples) == [0] * 6 + [1] * 6 + [2] * 6
    assert all(image.mode == "RGB" and image.height == 40 for image, _ in samples)


def test_resizing_shrinks_the_shorter_side_and_masks_with_it(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "wide.jpg").write_bytes(encode_jpeg(photo(0, 100, 151)))
    (source / "tall.png").write_bytes(encode_png(photo(1, 90, 60)))
    small = encode_jpeg(photo(2, 30, 80))
    (source / "small.jpg").write_bytes(small)
    main(["folder", str(source), str(tmp_path / "out"), "--resize", "40", "--workers", "1"])
    index = ShardIndex.open(tmp_path / "out")
    reader = ShardReader(index)
    found = {key.split("_")[1]: reader.read(n) for n, key in enumerate(index.keys(range(3)))}
    assert decode_image(found["wide"]["jpg"]).shape == (40, 60, 3)
    assert decode_image(found["tall"]["png"]).shape == (60, 40, 3)
    assert found["small"]["jpg"] == small
    reference = Image.fromarray(photo(1, 90, 60)).resize((40, 60), Image.Resampling.BICUBIC)
    error = np.abs(decode_image(found["tall"]["png"]).astype(int) - np.array(reference).astype(int))
    assert error.mean() < 2


def test_broken_images_are_listed_and_too_many_stop_the_command(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "in", per_class=40)
    whole = (source / "cat" / "3.v1.JPEG").read_bytes()
    (source / "cat" / "3.v1.JPEG").write_bytes(whole[: len(whole) // 2])
    (source / "dog" / "huge.png").write_bytes(huge_png())
    (source / "owl" / "none.jpg").write_bytes(b"")
    command = ["folder", str(source), str(tmp_path / "out"), "--workers", "1", "--per-shard", "30"]
    with pytest.raises(UserError, match=r"more than --max-broken 0\.01 of all; the first: "):
        main(command)
    main([*command, "--max-broken", "0.05"])
    ledger = [json.loads(line) for line in (tmp_path / "out" / "broken.jsonl").read_text().splitlines()]
    reasons = {entry["key"].rsplit("/", 1)[-1]: entry["reason"] for entry in ledger}
    assert len(ledger) == 3
    assert "pixels" in next(reason for name, reason in reasons.items() if "huge" in name)
    assert len(ShardIndex.open(tmp_path / "out")) == 119
    assert json.loads((tmp_path / "out" / "info.json").read_text())["broken"] == 3


def test_verify_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["shapes", str(tmp_path / "set"), "--count", "20", "--per-shard", "10", "--workers", "1"])
    shard = next(iter(sorted((tmp_path / "set").glob("*.tar"))))
    content = bytearray(shard.read_bytes())
    content[700] ^= 0xFF
    shard.write_bytes(content)
    assert main(["--verify", str(tmp_path)]) == 1
    assert f"{shard.name}: its checksum differs" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \*\.tar in"):
        main(["--verify", str(tmp_path / "empty")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no SOURCE given"),
        (["tetrominos", "x"], "did you mean tetrominoes"),
        (["tetrominoes"], "takes OUTPUT, not 0 paths"),
        (["folder", "x"], "takes INPUT OUTPUT"),
        (["folder", "/nowhere", "x"], "/nowhere does not exist"),
        (["tetrominoes", "x", "--count", "0"], "--count must be at least 1"),
        (["tetrominoes", "x", "--max-broken", "2"], "share between 0 and 1"),
        (["tetrominoes", "x", "--split", "val"], "no split 'val'"),
        (["tetrominoes", "x", "--givens", "30"], "--givens means nothing for tetrominoes; it is for sudoku"),
    ],
)
def test_errors_name_the_remedy(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(arguments)


def test_a_full_disk_is_told_and_the_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    command = ["shapes", str(tmp_path / "set"), "--count", "6", "--per-shard", "3", "--workers", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(making.ShardWriter, "close", full)
        with pytest.raises(UserError, match=r"No space left on device; once that is mended the same command goes on"):
            main(command)
    assert main(command) == 0
    assert main(["--verify", str(tmp_path / "set")]) == 0


def test_shards_of_several_folders_by_a_pattern(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"part-{number}").mkdir()
        with ShardWriter(tmp_path / f"part-{number}" / "0.tar") as writer:
            writer.write(f"{number}", {"png": encode_png(photo(number))})
    main(["shards", f"{tmp_path}/part-{{0..1}}/0.tar", str(tmp_path / "out"), "--workers", "1"])
    assert len(ShardIndex.open(tmp_path / "out")) == 2


def test_foreign_tars_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.tar").write_bytes(b"precious")
    with pytest.raises(UserError, match="tars that are not of this command"):
        main(["shapes", str(tmp_path), "--count", "3"])
    assert (tmp_path / "mine.tar").read_bytes() == b"precious"


def test_every_kind_has_its_module(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib import import_module

    for kind in KINDS.values():
        assert callable(import_module(f"pretrain.data.sources.{kind.module}").open_source)
    assert main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(KINDS)
