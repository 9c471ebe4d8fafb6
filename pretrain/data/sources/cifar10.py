"""CIFAR-10 (Krizhevsky, 2009): the Python archive, packed or not, or a tree `{train,test}/CLASS/*.{jpg,png}`.

The archive's pickles are read without unpickling. Its images are stored as PNG, those of a tree as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from configs.errors import UserError
from pretrain.data.sources.files import FileSource, PictureSource
from pretrain.data.sources.folder import by_split
from pretrain.data.sources.pickled import PickleRefusedError, load_plain
from pretrain.data.sources.picture import encode_png
from pretrain.data.sources.sample import Request
from pretrain.data.sources.tree import Tree, is_image, open_tree

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}


class ArraySource(PictureSource):
    """Images in memory."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> None:
        """
        Args:
            images: uint8 [N, H, W, 3]. labels: int [N]. names: N of them.
        """
        self.images, self.labels, self.names, self.classes = images, labels, names, CLASSES

    def __len__(self) -> int:
        return len(self.images)

    def name_of(self, number: int) -> str:
        return self.names[number]

    def parts_of(self, number: int) -> dict[str, bytes]:
        return {"png": encode_png(self.images[number]), "cls": str(self.labels[number]).encode()}


def open_source(name: str, request: Request) -> dict[str, ArraySource] | dict[str, FileSource]:
    """Sources `train` and `test`, those of them that are there.

    Raises:
        UserError: it is neither the archive nor a tree of the ten classes.
    """
    assert request.input is not None
    tree = open_tree(request.input, request.temporary)
    request.notes.extend(tree.notes)
    files = {file.rsplit("/", 1)[-1]: number for number, file in enumerate(tree.names)}
    if "test_batch" in files or "data_batch_1" in files:
        return {
            split: _from_batches(tree, [files[batch] for batch in batches if batch in files])
            for split, batches in BATCHES.items()
            if any(batch in files for batch in batches)
        }
    images = [number for number, file in enumerate(tree.names) if is_image(file)]
    sources = by_split(tree, images, request.notes) if images else {}
    if not sources or any(tuple(source.classes) != CLASSES for source in sources.values()):
        raise UserError(
            f"{request.input} is no CIFAR-10: neither data_batch_1..5 and test_batch, nor {{train,test}}/CLASS/*.jpg "
            f"with the classes {', '.join(CLASSES)}"
        )
    return sources


def _from_batches(tree: Tree, numbers: Sequence[int]) -> ArraySource:
    batches = []
    for number in numbers:
        try:
            batch = load_plain(tree.read(number))
            data, labels = batch["data"], np.asarray(batch["labels"], np.int64)
            names = [name.decode("latin-1") if isinstance(name, bytes) else str(name) for name in batch["filenames"]]
            if (
                data.shape != (len(labels), 3 * 32 * 32)
                or len(names) != len(labels)
                or not set(labels) <= set(range(10))
            ):
                raise PickleRefusedError("its arrays do not fit together")
        except (PickleRefusedError, KeyError, TypeError, ValueError, AttributeError, OSError) as error:
            raise UserError(f"{tree.place}: {tree.names[number]} is no batch of CIFAR-10 ({error})") from error
        batches.append((data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels, names))
    images, labels_of, names_of = zip(*batches)
    return ArraySource(np.concatenate(images), np.concatenate(labels_of), [name for part in names_of for name in part])
