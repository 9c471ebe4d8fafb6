"""Tar: the headers of an archive, read in one pass over a stream. Written for tars made by others, even hostile ones.

Nothing is extracted. Names are data, never paths; links, devices and names that would leave a folder are reported and
passed over. v7, ustar, GNU long names and pax (path, size) are understood, as Python's tarfile writes them; tarfile
itself is 2.5 times slower, keeps an object per member, and raises many kinds of errors on garbage.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

BLOCK = 512
CHUNK = 1 << 20
MAX_NAME = 1 << 16  # bytes of a long name or pax header; longer ones are taken for garbage
ZERO_BLOCK = bytes(BLOCK)
FILE = (b"0", b"\0", b"7")
FOLDER = b"5"
EXTENDED = (b"L", b"K", b"x", b"X", b"g")  # long name, long link, pax (own, Solaris), pax for all that follow
WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
NOT_A_FILE = {b"1": "hard link", b"2": "symbolic link", b"3": "device", b"4": "device", b"6": "named pipe"}
COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}  # first bytes
PAX_RECORD = re.compile(rb"(\d{1,9}) ([^=\n]+)=")


class Member(NamedTuple):
    """One regular file: name as stored, byte position of its data, size in bytes."""

    name: str
    offset: int
    size: int


class TarDamagedError(Exception):
    """The archive cannot be read on from here. `cut` is the member that it ends inside, if one has been yielded."""

    def __init__(self, message: str, cut: Member | None = None) -> None:
        super().__init__(message)
        self.cut = cut


class Stream:
    """Bytes in order, with position and (if wanted) SHA-256 of all that passed.

    Without a digest, long skips seek where the file can.
    """

    def __init__(self, file: BinaryIO, *, digest: bool = True) -> None:
        self._file = file
        self._sha256 = hashlib.sha256() if digest else None
        self._buffer = b""
        self._at = 0  # position inside the buffer
        self.position = 0  # position in the file
        self._seekable = not digest and file.seekable()

    def _fill(self) -> bool:
        self._buffer, self._at = self._file.read(CHUNK), 0
        if self._sha256 is not None:
            self._sha256.update(self._buffer)
        return bool(self._buffer)

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end of the file."""
        pieces = []
        while size > 0 and (self._at < len(self._buffer) or self._fill()):
            piece = self._buffer[self._at : self._at + size]
            self._at += len(piece)
            self.position += len(piece)
            size -= len(piece)
            pieces.append(piece)
        return b"".join(pieces)

    def skip(self, size: int) -> int:
        """Pass over `size` bytes; returns how many there were (a seek does not notice the end of the file)."""
        start = self.position
        while size > 0:
            here = min(size, len(self._buffer) - self._at)
            self._at += here
            self.position += here
            size -= here
            if size > CHUNK and self._seekable:
                self._file.seek(self.position + size)
                self._buffer, self._at = b"", 0
                self.position += size
                size = 0
            elif size > 0 and not self._fill():
                break
        return self.position - start

    def finish(self) -> tuple[int, bytes]:
        """Read to the end: number of bytes of the file and their SHA-256 (empty without a digest)."""
        while self.skip(CHUNK) == CHUNK:
            pass
        return self.position, self._sha256.digest() if self._sha256 is not None else b""


def _number(field: bytes) -> int:
    """A numeric field: octal text, or binary when the first bit is set (GNU)."""
    if field and field[0] & 0x80:
        value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        return value if value < 1 << 62 else -1
    text = field.split(b"\0", 1)[0].strip(b" ")
    return int(text or b"0", 8) if re.fullmatch(rb"[0-7]*", text) else -1


def is_header(block: bytes) -> bool:
    """Whether a block of 512 bytes is the header of a member, by its checksum."""
    return _number(block[148:156]) == sum(block) - sum(block[148:156]) + 8 * 32


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "replace")


def _pax(data: bytes) -> dict[str, str]:
    """Records `LENGTH KEY=VALUE\\n` of a pax header; reading stops at the first malformed one."""
    records, at = {}, 0
    while match := PAX_RECORD.match(data, at):
        length = int(match[1])
        value = data[match.end() : at + length - 1]
        if length < len(match[0]) or at + length > len(data):
            break
        records[match[2].decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        at += length
    return records


def unsafe(name: str) -> bool:
    """Whether a name would lie outside the folder it is unpacked into: absolute, or with `..`."""
    parts = name.replace("\\", "/").split("/")
    return not name or parts[0] == "" or parts[0].endswith(":") or ".." in parts


def _header(stream: Stream, report: Callable[[str], None]) -> tuple[bytes, int] | None:
    """The next header and the size it gives, or None at the end of the archive."""
    position = stream.position
    header = stream.read(BLOCK)
    if not header and position > 0:
        report(f"no end mark after {position} bytes: the archive may have been cut short there")
        return None
    if header == ZERO_BLOCK:
        return None
    if len(header) < BLOCK or not is_header(header):
        raise TarDamagedError(_why_none(header, position))
    size = _number(header[124:136])
    if size < 0:
        raise TarDamagedError(f"impossible size at byte {position}")
    return header, size


def _why_none(block: bytes, position: int) -> str:
    """Why what was read in the place of a header is none."""
    packer = next((packer for magic, packer in COMPRESSED.items() if block.startswith(magic)), None)
    if packer and position == 0:
        return f"compressed by {packer}, and samples are read from plain tars: {packer} -d < THIS > PLAIN.tar"
    if len(block) < BLOCK:
        return f"ends inside a header at byte {position}" if block else "empty file"
    return f"no tar header at byte {position} (wrong checksum)"


def _extended(stream: Stream, size: int) -> bytes:
    """Data of a long name or pax header; the stream is left at the next header."""
    if size > MAX_NAME:
        raise TarDamagedError(f"name of {size} bytes at byte {stream.position}")
    data = stream.read(size)
    if len(data) < size or stream.skip(-size % BLOCK) < -size % BLOCK:
        raise TarDamagedError(f"ends inside a name at byte {stream.position}")
    return data


def _name(header: bytes) -> str:
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return (prefix + "/" if prefix else "") + _text(header[:100])


def _problem(kind: bytes, name: str) -> str:
    """Why a member is no plain file to be used, or an empty string."""
    if kind in NOT_A_FILE:
        return NOT_A_FILE[kind]
    if kind not in FILE:
        return f"member of unknown type {kind!r}"
    return "name outside the archive" if unsafe(name) else ""


def members(stream: Stream, report: Callable[[str], None]) -> Iterator[Member]:
    """Regular files in order. While one is yielded the stream stands at its data; what is not read is passed over.

    Args:
        stream: at the beginning of the archive.
        report: called with one line for each member that is passed over; folders pass in silence.

    Raises:
        TarDamagedError: garbage, or the archive ends early. A member cut off by the end of the file has then been
            yielded already, and is named by the error as `cut`. (A stream that seeks does not
            see the end of the file: there the caller compares positions with the file's size.)
    """
    long_name, long_size = "", -1
    member: Member | None
    while (found := _header(stream, report)) is not None:
        header, size = found
        kind = header[156:157]
        if kind in EXTENDED:
            data = _extended(stream, size)
            records = _pax(data) if kind in (b"x", b"X") else {"path": _text(data)} if kind == b"L" else {}
            long_name = records.get("path", long_name)
            long_size = int(records["size"]) if re.fullmatch(r"[0-9]{1,18}", records.get("size", "")) else long_size
            continue
        name, size = long_name or _name(header), size if long_size < 0 else long_size
        long_name, long_size = "", -1
        data_at, member = stream.position, None
        problem = "" if kind == FOLDER or (kind in FILE and name.endswith("/")) else _problem(kind, name)
        if problem:
            report(f"{name[:80]!r}: {problem}, ignored")
        elif kind in FILE and not name.endswith("/"):
            member = Member(name, data_at, size)
            yield member
        if kind in WITHOUT_DATA:
            continue
        rest = data_at + size + -size % BLOCK - stream.position
        if stream.skip(rest) < rest:
            # Only the padding of the last member may be missing: some writers leave it out.
            if stream.position < data_at + size:
                missing = data_at + size - stream.position
                raise TarDamagedError(f"ends inside {name[:80]!r}, {missing} bytes missing", member)
            return
