"""Tree: the files of a folder, a tar or a zip under their names, read in any order. Nothing is unpacked to its name.

Compressed tars cannot be read in any order: they are first decompressed to a plain tar in a temporary folder.
Names that would lie outside, links and devices are passed over and noted.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, overload

import numpy as np

from configs.errors import UserError
from pretrain.data.tar import Member, Stream, TarDamagedError, members, unsafe

MAX_FILE = 1 << 30  # bytes of one file; an image or annotation is smaller
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}


class Names(Sequence[str]):
    """Strings in two arrays: a million names cost their letters, and go to a worker process in one piece."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._text = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([0] + [len(name) for name in encoded])

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        if isinstance(at, slice):
            return [self[index] for index in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        at %= len(self)
        return bytes(self._text[self._ends[at] : self._ends[at + 1]]).decode("utf-8", "surrogateescape")


class Tree(Protocol):
    """Files by number; `names` are in sorted order, with `/` between folders."""

    names: Names
    notes: list[str]
    place: str

    def read(self, number: int) -> bytes:
        """The content of a file. Raises OSError when it cannot be read."""
        ...


def _hidden(name: str) -> bool:
    """Files that systems leave behind (.DS_Store, __MACOSX/) are no part of a data set."""
    return any(piece.startswith((".", "__MACOSX")) for piece in name.split("/"))


class FolderTree:
    """The files below a folder. Links are followed, to folders once; hidden files are left out."""

    def __init__(self, folder: Path) -> None:
        self.place, self.notes = str(folder), list[str]()
        self.names = Names(sorted(_walk(str(folder), "", set())))

    def read(self, number: int) -> bytes:
        return Path(self.place, self.names[number]).read_bytes()


def _walk(folder: str, prefix: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        for entry in entries:
            if _hidden(entry.name):
                continue
            if entry.is_dir():
                yield from _walk(entry.path, f"{prefix}{entry.name}/", seen)
            elif entry.is_file():
                yield prefix + entry.name


class TarTree:
    """The files of an uncompressed tar, and with `nested` those of the tars inside it, as `NAME_OF_TAR/NAME`."""

    def __init__(self, path: Path, *, nested: bool = False) -> None:
        self.place, self.notes = str(path), list[str]()
        self._file: int | None = None
        found: list[Member] = []
        try:
            with open(path, "rb") as file:
                found.extend(self._scan(file, 0, path.stat().st_size, nested))
        except TarDamagedError as error:
            if not found:
                raise UserError(f"{path} cannot be read as a tar: {error}; download it again") from error
        found.sort()
        self.names = Names(member.name for member in found)
        self._at = np.array([(member.offset, member.size) for member in found], np.int64).reshape(-1, 2)

    def _scan(self, file: BinaryIO, start: int, stop: int, nested: bool) -> Iterator[Member]:
        inner: list[Member] = []
        try:
            for member in members(Stream(_Window(file, start, stop), digest=False), self.notes.append):  # type: ignore[arg-type]
                at = Member(member.name.removeprefix("./"), start + member.offset, member.size)
                if at.offset + at.size > stop:
                    self.notes.append(f"{at.name}: cut off by the end of the file")
                elif nested and at.name.endswith(".tar"):
                    inner.append(at)
                elif not _hidden(at.name):
                    yield at
        except TarDamagedError as error:
            self.notes.append(str(error))
            if start == 0 and not inner:
                raise
        for tar in inner:
            folder = tar.name.removesuffix(".tar")
            for member in self._scan(file, tar.offset, tar.offset + tar.size, False):
                yield Member(f"{folder}/{member.name}", member.offset, member.size)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def read(self, number: int) -> bytes:
        if self._file is None:
            self._file = os.open(self.place, os.O_RDONLY | os.O_CLOEXEC)
        offset, size = (int(value) for value in self._at[number])
        if size > MAX_FILE:
            raise OSError(f"{size} bytes are more than one picture has")
        content = os.pread(self._file, size, offset)
        if len(content) < size:
            raise OSError("cut off by the end of the tar")
        return content


class _Window:
    """A part of a file as a file: a tar inside a tar."""

    def __init__(self, file: BinaryIO, start: int, stop: int) -> None:
        self._file, self._start, self._stop, self._at = file, start, stop, start

    def read(self, size: int) -> bytes:
        self._file.seek(self._at)
        data = self._file.read(max(0, min(size, self._stop - self._at)))
        self._at += len(data)
        return data

    def seek(self, position: int) -> int:
        self._at = min(self._start + position, self._stop)
        return self._at - self._start

    def seekable(self) -> bool:
        return True


class ZipTree:
    """The files of a zip archive."""

    def __init__(self, path: Path) -> None:
        self.place, self.notes = str(path), list[str]()
        self._zip: zipfile.ZipFile | None = None
        with self._opened() as archive:
            found = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
        self.notes += [f"{name[:80]!r}: name outside the archive, ignored" for name in found if unsafe(name)]
        self.names = Names(sorted(name for name in found if not unsafe(name) and not _hidden(name)))

    def _opened(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.place)
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise UserError(f"{self.place} cannot be read as a zip archive: {error}; download it again") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_zip": None}

    def read(self, number: int) -> bytes:
        self._zip = self._zip or self._opened()
        entry = self._zip.getinfo(self.names[number])
        if entry.file_size > MAX_FILE:
            raise OSError(f"{entry.file_size} bytes are more than one picture has")
        try:
            return self._zip.read(entry)
        except (
            zipfile.BadZipFile,
            zlib.error,
            lzma.LZMAError,
            NotImplementedError,
            RuntimeError,
            EOFError,
            ValueError,
        ) as error:
            raise OSError(str(error)) from error


def open_tree(path: Path, temporary: Path, *, nested: bool = False) -> Tree:
    """The files of a folder, tar (also .gz, .bz2, .xz) or zip.

    Args:
        temporary: folder for what must be decompressed; the caller removes it.
        nested: look into tars inside a tar.

    Raises:
        UserError: it is none of these, or damaged.
    """
    if path.is_dir():
        return FolderTree(path)
    with open(path, "rb") as file:
        start = file.read(6)
    if start[:4] == b"PK\x03\x04":
        return ZipTree(path)
    for magic, opener in COMPRESSED.items():
        if start.startswith(magic):
            return TarTree(_decompressed(path, temporary, opener), nested=nested)
    return TarTree(path, nested=nested)


def _decompressed(path: Path, temporary: Path, opener: Any) -> Path:
    temporary.mkdir(parents=True, exist_ok=True)
    target = temporary / f"{path.name}-{path.stat().st_size}.plain"
    if not target.exists():
        partial = target.with_suffix(".part")
        try:
            with opener(path, "rb") as source, open(partial, "wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
        except (OSError, EOFError, lzma.LZMAError, ValueError) as error:
            partial.unlink(missing_ok=True)
            raise UserError(f"{path} cannot be decompressed to {temporary}: {error}") from error
        os.replace(partial, target)
    return target


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def numbers_by_name(tree: Tree) -> dict[str, int]:
    """Number of each file, for trees of moderate size."""
    return {name: number for number, name in enumerate(tree.names)}
