"""The multi-object datasets (Kabra et al., 2019) from their TFRecords: Tetrominoes, multi-dSprites, CLEVR with masks.

INPUT is the .tfrecords file. Records are read in order: the first ones are the training split, the next 320 the test
split, as is customary (Greff et al., arXiv 1903.00450, and evaluations after it). CLEVR6 keeps scenes of at most six
objects. Unless raw, pictures are cut as the published AKOrN evaluation does: Tetrominoes [1:33], CLEVR rows 29 to 221
and columns 64 to 256, then 128 px (image and mask nearest). That evaluation takes records 64 to 383 as its test set.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from configs.errors import UserError
from pretrain.data.sources.clevrtex import square
from pretrain.data.sources.existing import ShardSource, spool
from pretrain.data.sources.picture import encode_labels, encode_png
from pretrain.data.sources.sample import Request, Sample, key_of
from pretrain.data.sources.tfrecord import RecordError, Value, example, records

TEST = 320  # scenes


@dataclass(frozen=True)
class Form:
    """How a dataset stores its scenes, and how many records of the file are for training.

    Attributes:
        entities: masks of a scene, the background's first.
        entities_last: masks are stored as [H, W, entities], not [entities, H, W].
    """

    height: int
    width: int
    entities: int
    train: int
    most_objects: int | None = None
    entities_last: bool = False


FORMS = {
    "tetrominoes-records": Form(35, 35, 4, 60_000),
    "multi-dsprites-records": Form(64, 64, 6, 60_000, entities_last=True),
    "clevr6-records": Form(240, 320, 11, 70_000, most_objects=6),
    "clevr-records": Form(240, 320, 11, 70_000),
}


def open_source(name: str, request: Request) -> dict[str, ShardSource]:
    """Sources `train` and `test`; with a count, `train` has that many scenes and `test` still follows at its place.

    Raises:
        UserError: not such a file, or damaged.
    """
    assert request.input is not None
    form = FORMS[name]
    sources = {}
    for split, first, last in (("train", 0, form.train), ("test", form.train, None)):
        if request.splits and split not in request.splits:
            continue
        limit = request.count if split == "train" else TEST
        scenes = _scenes(name, request.input, first, last, limit, request.raw)
        try:
            sources[split] = spool(scenes, request.temporary / f"{split}-{limit}-{'raw' if request.raw else 'cut'}")
        except UserError as error:
            if split == "train" or not str(error).startswith("no samples"):
                raise
            request.notes.append(f"the file has no more than {form.train} records: no test split")
    return sources


def _scenes(name: str, path: Path, first: int, last: int | None, limit: int | None, raw: bool) -> Iterator[Sample]:
    """Scenes of the records from `first` to `last`, at most `limit`."""
    form, written = FORMS[name], 0
    try:
        for number, record in enumerate(records(path)):
            if number == last or written == limit:
                return
            if number >= first:
                scene = _decode(form, example(record))
                if scene is not None:
                    yield Sample(key_of(number), _parts(name, *scene, raw=raw))
                    written += 1
    except RecordError as error:
        raise UserError(f"{path} is no TFRecord file of {name.removesuffix('-records')} ({error})") from error


def _decode(form: Form, features: dict[str, Value]) -> tuple[np.ndarray, np.ndarray] | None:
    """Image uint8 [H, W, 3] and labels uint8 [H, W] (0: first entity, the background); None: too many objects."""
    size = (form.height, form.width)
    image = _pixels(features, "image", (*size, 3))
    if form.entities_last:
        mask = np.moveaxis(_pixels(features, "mask", (*size, form.entities)), -1, 0)
    else:
        mask = _pixels(features, "mask", (form.entities, *size))
    visible = np.asarray(features.get("visibility", np.ones(form.entities)), np.float32)
    if form.most_objects is not None and (visible[1:] > 0).sum() > form.most_objects:
        return None
    labels = np.where(mask.any(axis=0), mask.argmax(axis=0), 0).astype(np.uint8)
    return image, labels


def _pixels(features: dict[str, Value], name: str, shape: tuple[int, ...]) -> np.ndarray:
    values = features.get(name)
    if isinstance(values, list):
        values = np.frombuffer(b"".join(values), np.uint8)
    if values is None or values.dtype != np.uint8 or len(values) != int(np.prod(shape)):
        raise RecordError(f"feature {name!r} is not {' x '.join(map(str, shape))} bytes")
    return values.reshape(shape)


def _parts(name: str, image: np.ndarray, labels: np.ndarray, *, raw: bool) -> dict[str, bytes]:
    if not raw and name.startswith("tetrominoes"):
        image, labels = image[1:33, 1:33], labels[1:33, 1:33]
    elif not raw and name.startswith("clevr"):
        image, labels = square(image, labels, 29, 64, 192, Image.Resampling.NEAREST)
    return {"png": encode_png(np.ascontiguousarray(image)), "instances.png": encode_labels(labels)}
