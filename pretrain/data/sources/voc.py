"""PascalVOC 2012, segmentation: images with instance and class masks, splits train and val.

INPUT: VOCtrainval_11-May-2012.tar, or the folder VOCdevkit or VOC2012. Masks are stored as they are: palette PNG whose
indices are the labels, 255 for the border that evaluation ignores.
"""

from __future__ import annotations

from collections.abc import Sequence

from configs.errors import UserError
from pretrain.data.sources.files import PictureSource
from pretrain.data.sources.picture import image_part
from pretrain.data.sources.sample import Request
from pretrain.data.sources.tree import Tree, numbers_by_name, open_tree

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
LISTS = "ImageSets/Segmentation/"


class VocSource(PictureSource):
    """Images of one list."""

    classes = CLASSES

    def __init__(self, tree: Tree, identities: Sequence[str], files: Sequence[tuple[int, int, int]]) -> None:
        """
        Args:
            files: numbers of image, instance mask and class mask in the tree, for each identity.
        """
        self.tree, self.identities, self.files = tree, identities, files

    def __len__(self) -> int:
        return len(self.identities)

    def name_of(self, number: int) -> str:
        return self.identities[number]

    def parts_of(self, number: int) -> dict[str, bytes]:
        image, instances, classes = (self.tree.read(file) for file in self.files[number])
        return {**image_part(image), "instances.png": instances, "classes.png": classes}


def open_source(name: str, request: Request) -> dict[str, VocSource]:
    """Sources `train` and `val`.

    Raises:
        UserError: no lists there, or files of a list are missing.
    """
    assert request.input is not None
    tree = open_tree(request.input, request.temporary)
    request.notes.extend(tree.notes)
    numbers = numbers_by_name(tree)
    sources = {}
    for split in ("train", "val"):
        lists = [file for file in numbers if f"/{file}".endswith(f"/{LISTS}{split}.txt")]
        if lists and (not request.splits or split in request.splits):
            listed = min(lists, key=lambda file: "VOC2012/" not in file)  # VOC2007 may lie beside it
            root = listed.removesuffix(f"{LISTS}{split}.txt")
            identities = tree.read(numbers[listed]).decode("ascii", "replace").split()
            sources[split] = VocSource(tree, identities, [_files(numbers, root, name, tree) for name in identities])
    if not sources:
        raise UserError(f"no PascalVOC in {request.input}: looked for VOC2012/{LISTS}train.txt and val.txt")
    return sources


def _files(numbers: dict[str, int], root: str, identity: str, tree: Tree) -> tuple[int, int, int]:
    wanted = (f"JPEGImages/{identity}.jpg", f"SegmentationObject/{identity}.png", f"SegmentationClass/{identity}.png")
    for file in wanted:
        if root + file not in numbers:
            raise UserError(f"{tree.place} lists {identity}, but {root}{file} is not there; unpack it completely")
    image, instances, classes = (numbers[root + file] for file in wanted)
    return image, instances, classes
