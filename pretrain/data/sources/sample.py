"""Sample: what a source hands over for one picture, and what a source is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Sample:
    """Parts under their names in a shard: jpg, png or webp; cls, instances.png, classes.png, json."""

    key: str
    parts: dict[str, bytes]


@dataclass(frozen=True)
class Broken:
    """A picture that cannot be used: its name for the ledger, and why."""

    key: str
    reason: str


class Source(Protocol):
    """Pictures by number. Picklable: worker processes get a copy."""

    classes: Sequence[str]
    """Names of the labels in `cls`, empty without labels."""

    def __len__(self) -> int:
        """Number of pictures, broken ones among them."""
        ...

    def read(self, numbers: np.ndarray) -> Iterator[Sample | Broken]:
        """The pictures of these numbers, int64 [n], in this order."""
        ...


@dataclass(frozen=True)
class Request:
    """What a user asks of a source.

    Attributes:
        temporary: folder for what must be decompressed; removed when the set is finished.
        count: scenes to generate, or pictures to read at most from a stream.
        givens: range of the number of givens of Sudokus.
        raw: keep benchmark scenes as they are, not as the published protocol cuts them.
        notes: lines for the user that opening the source adds to.
    """

    input: Path | None
    temporary: Path
    count: int | None = None
    seed: int = 0
    raw: bool = False
    splits: Sequence[str] = ()
    givens: tuple[int, int] | None = None
    notes: list[str] = field(default_factory=list)


def key_of(number: int, name: str = "") -> str:
    """A key that is unique by its number and tells the picture's name: at most 75 characters of [A-Za-z0-9_-]."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[-64:]
    return f"{number:010d}{'_' if stem else ''}{stem}"
