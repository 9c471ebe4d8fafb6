"""Folder: images in a folder, tar or zip. A class for each subfolder, or flat; split by train, val and test folders."""

from __future__ import annotations

from collections.abc import Sequence

from configs.errors import UserError
from pretrain.data.sources.files import FileSource, aligned
from pretrain.data.sources.sample import Request
from pretrain.data.sources.tree import Tree, is_image, open_tree

SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def open_source(name: str, request: Request) -> dict[str, FileSource]:
    """Sources by split; one without a name where the top folders are not train, val, test.

    Raises:
        UserError: no images there.
    """
    assert request.input is not None
    tree = open_tree(request.input, request.temporary)
    request.notes.extend(tree.notes)
    images = [number for number, file in enumerate(tree.names) if is_image(file)]
    if not images:
        raise UserError(f"no images in {request.input} ({len(tree.names)} files; images end in .jpg, .png, .webp, ...)")
    return by_split(tree, images, request.notes)


def by_split(tree: Tree, images: Sequence[int], notes: list[str]) -> dict[str, FileSource]:
    """Sources of the images (numbers of the tree's files) by split."""
    paths = [tree.names[number].split("/") for number in images]
    depth = _common_depth(paths)
    tops = {path[depth] for path in paths if len(path) > depth + 1}
    if tops <= set(SPLITS) and tops and all(len(path) > depth + 1 for path in paths):
        found: dict[str, list[int]] = {}
        for number, path in zip(images, paths):
            found.setdefault(SPLITS[path[depth]], []).append(number)
        return aligned({split: labelled(tree, found[split], depth + 1, notes) for split in sorted(found)})
    return {"": labelled(tree, images, depth, notes)}


def _common_depth(paths: Sequence[Sequence[str]]) -> int:
    """Number of leading folders that all paths share (a tar's own top folder, say), short of splits."""
    depth, first = 0, paths[0]
    while first[depth] not in SPLITS and all(len(path) > depth + 1 and path[depth] == first[depth] for path in paths):
        depth += 1
    return depth


def labelled(tree: Tree, images: Sequence[int], depth: int, notes: list[str]) -> FileSource:
    """Images labelled by the folder at this depth, in sorted order; without labels where some lie in no folder."""
    paths = [tree.names[number].split("/") for number in images]
    nested = sum(len(path) > depth + 1 for path in paths)
    if nested < len(paths):
        if nested:
            notes.append(f"{len(paths) - nested} images lie in no subfolder, {nested} in one: no labels are written")
        return FileSource(tree, images, None, ())
    classes = sorted({path[depth] for path in paths})
    number_of = {name: number for number, name in enumerate(classes)}
    return FileSource(tree, images, [number_of[path[depth]] for path in paths], classes)
