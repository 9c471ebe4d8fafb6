"""ImageNet (ILSVRC 2012), as downloaded or unpacked.

INPUT is the folder with any of
    ILSVRC2012_img_train.tar    class tars in a tar            or  train/ with a folder for each synset
    ILSVRC2012_img_val.tar      50,000 images, flat            or  val/ flat, or with a folder for each synset
    ILSVRC2012_devkit_t12.tar.gz (or its folder)  or  LOC_val_solution.csv (Kaggle): labels of a flat val
Labels are 0 to 999 in the order of the synsets' names (n01440764, ...), as in torchvision and timm.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path

from configs.errors import UserError
from pretrain.data.sources.files import FileSource, aligned
from pretrain.data.sources.sample import Request
from pretrain.data.sources.tree import Tree, is_image, open_tree

SYNSET = re.compile(r"n[0-9]{8}")
VALIDATION = re.compile(r"ILSVRC2012_val_([0-9]{8})\.JPEG", re.IGNORECASE)
KAGGLE = Path("ILSVRC/Data/CLS-LOC")


def open_source(name: str, request: Request) -> dict[str, FileSource]:
    """Sources `train` and `val`, those of them that are there.

    Raises:
        UserError: neither is there; images of val without labels.
    """
    assert request.input is not None
    folder = request.input
    images = folder / KAGGLE if (folder / KAGGLE).is_dir() else folder
    sources = {}
    for split, opener in (("train", _train), ("val", _val)):
        path = _first(images, f"ILSVRC2012_img_{split}.tar", split)
        if path is not None and (not request.splits or split in request.splits):
            tree = open_tree(path, request.temporary, nested=split == "train")
            request.notes.extend(tree.notes)
            sources[split] = opener(tree, folder, request.temporary)
    if not sources:
        raise UserError(
            f"no ImageNet in {folder}: looked for ILSVRC2012_img_train.tar or train/, ILSVRC2012_img_val.tar or val/"
        )
    count = len(aligned(sources)[next(iter(sources))].classes)
    if count != 1000:
        request.notes.append(f"{folder} has {count} classes, ImageNet has 1000: labels are 0 to {count - 1}")
    return sources


def _first(folder: Path, *names: str) -> Path | None:
    return next((folder / name for name in names if (folder / name).exists()), None)


def _by_synset(tree: Tree, numbers: Sequence[int], synsets: Sequence[str]) -> FileSource:
    classes = sorted(set(synsets))
    label = {synset: number for number, synset in enumerate(classes)}
    return FileSource(tree, numbers, [label[synset] for synset in synsets], classes)


def _train(tree: Tree, folder: Path, temporary: Path) -> FileSource:
    """Images below a folder or class tar named by a synset."""
    numbers, synsets = _in_synsets(tree)
    if not numbers:
        raise UserError(f"{tree.place} holds no images in folders or tars named by synsets (n01440764, ...)")
    return _by_synset(tree, numbers, synsets)


def _in_synsets(tree: Tree) -> tuple[list[int], list[str]]:
    numbers, synsets = [], []
    for number, name in enumerate(tree.names):
        synset = next((piece for piece in reversed(name.split("/")[:-1]) if SYNSET.fullmatch(piece)), None)
        if synset is not None and is_image(name):
            numbers.append(number)
            synsets.append(synset)
    return numbers, synsets


def _val(tree: Tree, folder: Path, temporary: Path) -> FileSource:
    """Images in folders named by synsets, or flat ones with the labels of the development kit."""
    numbers, synsets = _in_synsets(tree)
    if numbers:
        return _by_synset(tree, numbers, synsets)
    truth = _ground_truth(folder, temporary)
    for number, name in enumerate(tree.names):
        match = VALIDATION.search(name)
        if match:
            numbers.append(number)
            synsets.append(truth.get(int(match[1]), ""))
    if not numbers or "" in synsets:
        missing = f"no label for {tree.names[numbers[synsets.index('')]]}" if numbers else "no ILSVRC2012_val_*.JPEG"
        raise UserError(f"{tree.place}: {missing}; is the development kit complete?")
    return _by_synset(tree, numbers, synsets)


def _ground_truth(folder: Path, temporary: Path) -> dict[int, str]:
    """Number of the validation image -> synset."""
    solution = _first(folder, "LOC_val_solution.csv")
    if solution is not None:
        rows = re.findall(r"ILSVRC2012_val_([0-9]{8}),(n[0-9]{8})", solution.read_text())
        return {int(number): synset for number, synset in rows}
    kit = _first(folder, "ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12")
    if kit is None:
        raise UserError(
            f"labels of the validation images: put ILSVRC2012_devkit_t12.tar.gz or LOC_val_solution.csv into {folder}, "
            "or sort the images into folders named by synset"
        )
    tree = open_tree(kit, temporary)
    files = {name.rsplit("/", 1)[-1]: number for number, name in enumerate(tree.names)}
    try:
        synset_of = _synsets(tree.read(files["meta.mat"]))
        lines = tree.read(files["ILSVRC2012_validation_ground_truth.txt"]).split()
        return {number: synset_of[int(line)] for number, line in enumerate(lines, 1)}
    except (KeyError, ValueError, OSError) as error:
        raise UserError(f"{kit} is no development kit of ILSVRC 2012 ({error!r}); download it again") from error


def _synsets(meta: bytes) -> dict[int, str]:
    """ILSVRC2012_ID -> WNID of the synsets without children, from the kit's Matlab file."""
    from scipy.io import loadmat

    table = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table.reshape(-1) if int(row["num_children"]) == 0}
