"""Fuzzing: hostile and damaged inputs of the data room must end in a user error or a ledger line.

    python tests/fuzz.py --cases 10000 --seed 0

Each case makes one input (random bytes, or a valid file that is mutated, cut, spliced or repacked), hands it to one
reader and asks: no other exception than those that the reader documents, no file outside the case's folder, an end
within the time limit. Prints the cases of each kind and exits with 1 at the first failure, naming its number.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import random
import signal
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

from configs.errors import UserError
from pretrain.data import columns
from pretrain.data.decode import BrokenImageError, decode_image, decode_mask
from pretrain.data.index import ShardIndex
from pretrain.data.scan import scan
from pretrain.data.shards import DamagedSample, ShardReader
from pretrain.data.sources import coco, folder, npz
from pretrain.data.sources.pickled import PickleRefusedError, load_plain
from pretrain.data.sources.sample import Request
from pretrain.data.sources.tfrecord import RecordError, example, records

LIMIT_S = 20  # a case that takes longer hangs
NAMES = (
    "a.jpg",
    "a.cls",
    "b.png",
    "../up.jpg",
    "/abs.png",
    "a/../../b.jpg",
    "x",
    ".jpg",
    "a.jpg.",
    "k" * 300,
    "\n.cls",
    "d/",
)
KINDS = b"0123456LKxgS7\0V"


class ExpiredError(BaseException):
    """Not an Exception: no reader may swallow it."""


def _image(draw: random.Random) -> bytes:
    buffer = io.BytesIO()
    pixels = np.frombuffer(draw.randbytes(5 * 7 * 3), np.uint8).reshape(5, 7, 3)
    form = draw.choice(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def _huge_png(draw: random.Random) -> bytes:
    """A header that promises 60,000 x 60,000 pixels."""
    head = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + bytes([draw.choice([1, 8, 16]), draw.choice([0, 2, 3]), 0, 0, 0])
    crc = zlib.crc32(head).to_bytes(4, "big")
    rest = draw.choice([draw.randbytes(draw.randrange(50)), (9).to_bytes(4, "big") + b"IDAT" + draw.randbytes(13)])
    return b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + head + crc + rest


def _tar(draw: random.Random) -> bytes:
    """A tar of odd members: names outside, links, devices, labels that are none, repeated keys, zero bytes."""
    buffer = io.BytesIO()
    form = draw.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for _ in range(draw.randrange(8)):
            name = draw.choice(NAMES)
            data = draw.choice([b"", b"7", b"cat", b"-3", b"9" * 40, _image(draw), _huge_png(draw)])
            info = tarfile.TarInfo(name)
            info.type = bytes([draw.choice(KINDS)]) if draw.random() < 0.3 else tarfile.REGTYPE
            info.linkname = draw.choice(["/etc/passwd", "a.jpg", ""])
            info.size = len(data) if info.type == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _mutated(draw: random.Random, content: bytes) -> bytes:
    """Bits turned, pieces cut, doubled or replaced; sometimes left as it is."""
    data = bytearray(content)
    for _ in range(draw.choice([0, 1, 1, 3, 20])):
        if not data:
            break
        at, length = draw.randrange(len(data)), draw.choice([1, 1, 4, 12, 512])
        action = draw.randrange(5)
        if action == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif action == 1:
            data[at : at + length] = draw.randbytes(min(length, len(data) - at))
        elif action == 2:
            del data[at : at + length]
        elif action == 3:
            data[at:at] = data[at : at + length]
        else:
            del data[at:]
    return bytes(data)


def case_scan(draw: random.Random, place: Path) -> None:
    content = draw.randbytes(draw.randrange(3000)) if draw.random() < 0.2 else _mutated(draw, _tar(draw))
    found = scan(io.BytesIO(content), "fuzz.tar")
    assert found.num_bytes == len(content)
    for row in range(len(found.keys)):
        for column in range(len(found.parts)):
            if found.offset[row, column]:
                assert int(found.offset[row, column]) * 512 + int(found.size[row, column]) <= len(content)


def case_set(draw: random.Random, place: Path) -> None:
    """A folder of shards, opened and read; half of the time they change between the two."""
    for number in range(draw.randrange(1, 4)):
        (place / f"{number}.tar").write_bytes(_mutated(draw, _tar(draw)))
    index = ShardIndex.open(place)
    if draw.random() < 0.5:
        (place / "0.tar").write_bytes(_mutated(draw, (place / "0.tar").read_bytes()))
    reader = ShardReader(index)
    index.keys(range(len(index)))
    for sample in range(len(index)):
        try:
            for content in reader.read(sample).values():
                decode_image(content)
        except (DamagedSample, BrokenImageError):
            continue
    index.warnings()


def case_index_file(draw: random.Random, place: Path) -> None:
    """A damaged index beside good shards."""
    columns.write(place / "x", {"a": np.arange(9, dtype=np.int64), "b": np.zeros((2, 3), np.uint8)}, {"format": "x"})
    (place / "x").write_bytes(_mutated(draw, (place / "x").read_bytes()))
    for array in columns.load(place / "x")[0].values():
        array.sum()


def case_image(draw: random.Random, place: Path) -> None:
    content = draw.choice([_mutated(draw, _image(draw)), _huge_png(draw), draw.randbytes(draw.randrange(99)), b""])
    draw.choice([decode_image, decode_mask])(content)


def case_pickle(draw: random.Random, place: Path) -> None:
    value = {"data": np.frombuffer(draw.randbytes(12), np.uint8), "labels": [1, 2], b"f": [b"a"], "e": Exit()}
    if draw.random() < 0.7:
        del value["e"]
    load_plain(_mutated(draw, pickle.dumps(value, protocol=draw.randrange(6))))


class Exit:
    """Ends the process when unpickled."""

    def __reduce__(self) -> tuple[Callable[[int], None], tuple[int]]:
        return os._exit, (77,)


def _varint(value: int) -> bytes:
    return bytes([value & 127 | 128]) + _varint(value >> 7) if value > 127 else bytes([value])


def case_record(draw: random.Random, place: Path) -> None:
    content = b"".join(
        _varint(draw.randrange(1, 60)) + (_varint(len(piece)) + piece if draw.random() < 0.8 else piece)
        for piece in (draw.randbytes(draw.randrange(20)) for _ in range(draw.randrange(6)))
    )
    if draw.random() < 0.5:
        example(_mutated(draw, content))
    else:
        (place / "r").write_bytes(_mutated(draw, len(content).to_bytes(8, "little") + bytes(4) + content))
        for record in records(place / "r"):
            example(record)


def case_archive(draw: random.Random, place: Path) -> None:
    """A folder source from a tar or zip with names that lead outside."""
    path = place / "in.bin"
    if draw.random() < 0.5:
        path.write_bytes(_mutated(draw, _tar(draw)))
    else:
        with zipfile.ZipFile(path, "w", draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
            for number in range(draw.randrange(5)):
                archive.writestr(draw.choice(NAMES) + str(number) * draw.randrange(2), _image(draw))
        path.write_bytes(_mutated(draw, path.read_bytes()))
    for source in folder.open_source("folder", Request(path, place / "temporary")).values():
        list(source.read(np.arange(len(source))))


def case_segmentation(draw: random.Random, place: Path) -> None:
    def number() -> float:
        return draw.choice([0.0, -1.0, 5.5, 1e9, float("nan"), float("inf"), draw.uniform(-50, 50)])

    counts = draw.choice(
        [[draw.randrange(-3, 400) for _ in range(draw.randrange(5))], draw.randbytes(8).decode("latin-1")]
    )
    segmentation = draw.choice(
        [
            [[number() for _ in range(draw.randrange(12))] for _ in range(draw.randrange(3))],
            {"counts": counts, "size": draw.choice([[20, 30], [9, 9], "x", None])},
            draw.choice(["x", 5, None, [], [None], {}]),
        ]
    )
    coco.label_maps(20, 30, [(1, segmentation)])


def case_npz(draw: random.Random, place: Path) -> None:
    shape = draw.choice([(2, 4, 4, 3), (2, 3, 4, 4), (2, 4, 4), (2,), (0, 4, 4)])
    np.savez(
        place / "a.npz", images=np.zeros(shape, draw.choice([np.uint8, np.float32])), labels=np.zeros((2, 4, 4), int)
    )
    (place / "a.npz").write_bytes(_mutated(draw, (place / "a.npz").read_bytes()))
    source = npz.open_source("npz", Request(place / "a.npz", place / "temporary"))[""]
    list(source.read(np.arange(len(source))))


EXPECTED = (UserError, BrokenImageError, PickleRefusedError, RecordError)
CASES: dict[str, tuple[Callable[[random.Random, Path], None], int]] = {
    "scan": (case_scan, 30),
    "set": (case_set, 10),
    "index file": (case_index_file, 10),
    "image": (case_image, 15),
    "pickle": (case_pickle, 15),
    "record": (case_record, 10),
    "archive": (case_archive, 10),
    "segmentation": (case_segmentation, 10),
    "npz": (case_npz, 5),
}


def _expire(*_: object) -> None:
    raise ExpiredError


def fuzz(cases: int, seed: int, *, first: int = 0, progress: bool = False) -> Counter[str]:
    """Run cases `first` to `first + cases - 1`; returns how often each kind ended well or in a documented error.

    Raises:
        AssertionError: with the number of the case that failed.
    """
    ended: Counter[str] = Counter()
    names, weights = list(CASES), [weight for _, weight in CASES.values()]
    previous = signal.signal(signal.SIGALRM, _expire)
    try:
        for number in range(first, first + cases):
            draw = random.Random(f"{seed}/{number}")
            name = draw.choices(names, weights)[0]
            ended[f"{name}: {_run(CASES[name][0], draw, number, name)}"] += 1
            if progress and (number + 1 - first) % 1000 == 0:
                print(f"{number + 1 - first} of {cases}", flush=True)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    return ended


def _run(case: Callable[[random.Random, Path], None], draw: random.Random, number: int, name: str) -> str:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as parent:
        place = Path(parent) / "inside"
        place.mkdir()
        signal.alarm(LIMIT_S)
        try:
            case(draw, place)
            outcome = "read"
        except EXPECTED:
            outcome = "refused"
        except ExpiredError:
            raise AssertionError(f"case {number} ({name}) hangs") from None
        except Exception as error:
            raise AssertionError(f"case {number} ({name}): {error!r}") from error
        finally:
            signal.alarm(0)
        outside = [entry for entry in os.listdir(parent) if entry != "inside"]
        assert not outside, f"case {number} ({name}) wrote {outside[0]} outside"
    return outcome


def main(argv: Sequence[str] | None = None) -> int:
    """Fuzz as asked on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to repeat one")
    options = parser.parse_args(argv)
    start = time.perf_counter()
    try:
        ended = fuzz(options.cases, options.seed, first=options.first, progress=True)
    except AssertionError as error:
        print(f"FAILED: {error}; again: --seed {options.seed} --first {error.args[0].split()[1]} --cases 1")
        return 1
    for line, count in sorted(ended.items()):
        print(f"{count:7d}  {line}")
    print(f"{options.cases} cases in {time.perf_counter() - start:.0f} s: none failed")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
