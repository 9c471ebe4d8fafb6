"""Files: pictures that are files of a tree, each with a label or none. What folder, ImageNet and CIFAR trees become."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pretrain.data.decode import BrokenImageError
from pretrain.data.sources.picture import image_part
from pretrain.data.sources.sample import Broken, Sample, key_of
from pretrain.data.sources.tree import Tree


class PictureSource:
    """A source by `parts_of` and `name_of`; what they raise about one picture becomes a line of the ledger."""

    classes: Sequence[str] = ()

    def parts_of(self, number: int) -> dict[str, bytes]:
        """Parts of a picture. Raises OSError or BrokenImageError when it cannot be used."""
        raise NotImplementedError

    def name_of(self, number: int) -> str:
        """Name of a picture in its source."""
        raise NotImplementedError

    def read(self, numbers: np.ndarray) -> Iterator[Sample | Broken]:
        """The pictures of these numbers, int64 [n], in this order."""
        for number in numbers.tolist():
            name = self.name_of(number)
            try:
                yield Sample(key_of(number, name.rsplit(".", 1)[0]), self.parts_of(number))
            except (OSError, BrokenImageError) as error:
                yield Broken(name, str(error))


class FileSource(PictureSource):
    """Files of a tree as pictures."""

    def __init__(
        self, tree: Tree, numbers: Sequence[int], labels: Sequence[int] | None, classes: Sequence[str]
    ) -> None:
        """
        Args:
            numbers: of the tree's files.
            labels: one for each of them, in 0 .. len(classes) - 1; None: no labels.
        """
        self.tree, self.classes = tree, classes
        self.numbers = np.asarray(numbers, np.int64)
        self.labels = None if labels is None else np.asarray(labels, np.int64)

    def __len__(self) -> int:
        return len(self.numbers)

    def name_of(self, number: int) -> str:
        return self.tree.names[int(self.numbers[number])]

    def parts_of(self, number: int) -> dict[str, bytes]:
        parts = image_part(self.tree.read(int(self.numbers[number])))
        return parts if self.labels is None else {**parts, "cls": str(self.labels[number]).encode()}


def aligned(sources: dict[str, FileSource]) -> dict[str, FileSource]:
    """The same sources with labels that mean the same in each: numbers in the sorted classes of all splits."""
    classes = sorted({name for source in sources.values() for name in source.classes})
    number_of = {name: number for number, name in enumerate(classes)}
    for source in sources.values():
        if source.labels is not None:
            source.labels = np.array([number_of[name] for name in source.classes], np.int64)[source.labels]
            source.classes = classes
    return sources
