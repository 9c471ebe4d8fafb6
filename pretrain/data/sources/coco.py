"""COCO 2017: images with instance and class masks from the instance annotations, splits train and val.

INPUT: the folder (or tar) with train2017/, val2017/ (also below images/) and annotations/instances_*2017.json; the
splits that are there. Crowds are dropped; pixels that two instances claim are 255 (65535 in masks of 16 bits), which
evaluation ignores. Classes are COCO's own category ids, 1 to 90. Polygons are drawn by pycocotools.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from configs.errors import UserError
from pretrain.data.decode import MAX_PIXELS, BrokenImageError
from pretrain.data.sources.files import PictureSource
from pretrain.data.sources.picture import encode_labels, image_part
from pretrain.data.sources.sample import Request
from pretrain.data.sources.tree import Names, Tree, numbers_by_name, open_tree

IGNORE = 65535


class CocoSource(PictureSource):
    """Images of one split with their annotations (kept as text: small, and quick to hand to workers)."""

    def __init__(self, tree: Tree, files: Sequence[int], records: Names, classes: Sequence[str]) -> None:
        self.tree, self.files, self.records, self.classes = tree, np.asarray(files, np.int64), records, classes

    def __len__(self) -> int:
        return len(self.files)

    def name_of(self, number: int) -> str:
        return self.tree.names[int(self.files[number])]

    def parts_of(self, number: int) -> dict[str, bytes]:
        height, width, annotations = json.loads(self.records[number])
        instances, classes = label_maps(height, width, annotations)
        parts = image_part(self.tree.read(int(self.files[number])))
        return {**parts, "instances.png": encode_labels(instances), "classes.png": encode_labels(classes)}


def label_maps(height: int, width: int, annotations: Sequence[tuple[int, object]]) -> tuple[np.ndarray, np.ndarray]:
    """Instance and class maps, int32 [H, W], 65535 where two instances overlap.

    Args:
        annotations: (category, segmentation as in COCO's JSON) of each instance.

    Raises:
        BrokenImageError: a segmentation that is none.
    """
    instances, classes = np.zeros((height, width), np.int32), np.zeros((height, width), np.int32)
    hits = np.zeros((height, width), np.uint8)
    # 255 would read as ignore in a map of 16 bits: no instance has that number.
    for number, (category, segmentation) in zip((n for n in range(1, IGNORE) if n != 255), annotations):
        inside = _inside(segmentation, height, width)
        instances[inside], classes[inside] = number, category
        hits += inside & (hits < 2)
    instances[hits > 1], classes[hits > 1] = IGNORE, IGNORE
    return instances, classes


def _inside(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Pixels of a segmentation (polygons, or run lengths down the columns), bool [H, W]."""
    try:
        if isinstance(segmentation, dict):
            counts = segmentation["counts"]
            runs = np.asarray(_runs(counts) if isinstance(counts, str) else counts, np.int64)
            if list(segmentation["size"]) != [height, width] or (runs < 0).any() or runs.sum() != height * width:
                raise ValueError("run lengths do not fill the image")
            values = np.arange(len(runs)) % 2 == 1
            return np.repeat(values, runs).reshape(width, height).T
        return _polygons(segmentation, height, width)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise BrokenImageError(f"a segmentation cannot be read: {error}") from error


def _runs(text: str) -> list[int]:
    """COCO's compressed run lengths: 5 bits a character, differences to the run two before."""
    runs: list[int] = []
    value = shift = 0
    for character in text.encode("ascii"):
        code = character - 48
        if not 0 <= code < 64 or shift > 50:
            raise ValueError("run lengths are damaged")
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            value -= (1 << shift) if code & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def _polygons(polygons: Sequence[Sequence[float]], height: int, width: int) -> np.ndarray:
    from pycocotools import mask

    points = [np.asarray(polygon, np.float64) for polygon in polygons]
    side = max(height, width)
    for polygon in points:
        # pycocotools checks nothing: coordinates far outside would make it run out of memory.
        if polygon.ndim != 1 or len(polygon) < 6 or len(polygon) % 2 or not (np.abs(polygon) <= 2 * side).all():
            raise ValueError("a polygon has fewer than three points, or points far outside the image")
    encoded = mask.frPyObjects([polygon.tolist() for polygon in points], height, width)
    return np.asarray(mask.decode(mask.merge(encoded)), bool)


def open_source(name: str, request: Request) -> dict[str, CocoSource]:
    """Sources `train` and `val`, those whose annotations and images are there.

    Raises:
        UserError: neither is there, or the annotations are damaged.
    """
    assert request.input is not None
    tree = open_tree(request.input, request.temporary)
    request.notes.extend(tree.notes)
    numbers = numbers_by_name(tree)
    sources = {}
    for split in ("train", "val"):
        annotations = next((file for file in numbers if file.endswith(f"instances_{split}2017.json")), None)
        if annotations is not None and (not request.splits or split in request.splits):
            source = _split(tree, numbers, annotations, f"{split}2017/", request.notes)
            if len(source):
                sources[split] = source
    if not sources:
        raise UserError(
            f"no COCO in {request.input}: looked for annotations/instances_train2017.json and instances_val2017.json, "
            "and images in train2017/ and val2017/"
        )
    return sources


def _split(tree: Tree, numbers: dict[str, int], annotations: str, folder: str, notes: list[str]) -> CocoSource:
    images = {file.rsplit("/", 1)[-1]: number for file, number in numbers.items() if f"/{folder}" in f"/{file}"}
    try:
        content = json.loads(tree.read(numbers[annotations]))
        of_image: dict[int, list[tuple[int, object]]] = defaultdict(list)
        for entry in content["annotations"]:
            if not entry.get("iscrowd", 0):
                of_image[entry["image_id"]].append((int(entry["category_id"]), entry["segmentation"]))
        files, records = [], []
        for image in sorted(content["images"], key=lambda image: str(image["file_name"])):
            height, width = int(image["height"]), int(image["width"])
            if not 0 < height * width <= MAX_PIXELS:
                raise ValueError(f"{image['file_name']} is said to have {width} x {height} pixels")
            if image["file_name"] in images:
                files.append(images[image["file_name"]])
                records.append(json.dumps([height, width, of_image[image["id"]]]))
        names = {int(entry["id"]): str(entry["name"]) for entry in content["categories"]}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{tree.place}: {annotations} is damaged ({error!r}); download it again") from error
    if len(files) < len(content["images"]):
        notes.append(f"{len(content['images']) - len(files)} annotated images are not in {folder}")
    classes = [names.get(number, "background" if number == 0 else "") for number in range(max(names, default=0) + 1)]
    return CocoSource(tree, files, Names(records), classes)
