"""Staging: remote shards on node-local disk, fetched through webdataset's gopen.

Several processes of a node share one folder. A shard is fetched by whichever process needs it first (a lock file says
so; the lock falls when its holder dies), appears by rename once its size and checksum are right, and leaves when the
folder is over its limit and it was used longest ago. A reader that still holds it open keeps its bytes: unlinking does
not take them away. gopen itself has no time-out for reading; ours counts the seconds without a byte.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import select
import shlex
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from pretrain.data.location import is_remote

CHUNK = 1 << 20
STAGED = re.compile(r"[0-9a-f]{16}-")  # names of staged shards: see `path`


class StagingError(RuntimeError):
    """A remote shard could not be fetched: names the shard, the cause, and what to do."""


class ShardChangedError(RuntimeError):
    """A shard was fetched whole and is not the one that was indexed."""


class _TimedReader:
    """Bytes of a gopen stream. A read without a byte for `timeout_s` seconds ends the fetching processes and raises."""

    def __init__(self, stream: Any, timeout_s: float) -> None:
        self._stream, self._timeout_s = stream, timeout_s
        self._process = getattr(stream, "proc", None)
        self._file: BinaryIO = getattr(stream, "stream", stream)
        self._poll = select.poll()
        if self._process is not None:
            self._poll.register(self._file.fileno(), select.POLLIN | select.POLLHUP)

    def read(self, size: int = CHUNK) -> bytes:
        """Up to `size` bytes; empty at the end. Raises OSError (TimeoutError among them) when fetching failed."""
        if self._process is None:
            return self._file.read(size)
        if not self._poll.poll(self._timeout_s * 1000):
            raise TimeoutError(errno.ETIMEDOUT, f"no byte for {self._timeout_s:.0f} s")
        data = os.read(self._file.fileno(), size)
        if not data and (status := self._process.wait(self._timeout_s)) != 0:
            raise OSError(errno.EIO, f"fetching ended with exit status {status}")
        return data

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            for process in _descendants(self._process.pid):
                _kill(process)
        if self._process is not None:
            self._file.close()
            self._process.wait()
        else:
            self._stream.close()


def _descendants(process: int) -> list[int]:
    """A process and what it started, children last; gopen's `pipe:` runs a shell with the fetching program inside."""
    found = [process]
    for parent in found:
        try:
            found += [int(child) for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
        except OSError:
            continue
    return found


def _kill(process: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


@contextmanager
def open_stream(url: str, *, timeout_s: float = 300.0) -> Iterator[BinaryIO]:
    """A shard as a stream of bytes: a local file, or a URL through webdataset's gopen with our time-out.

    `s3://` is no scheme of gopen's: it goes through its `pipe:` to the `aws` program.
    """
    if not is_remote(url):
        with open(url.removeprefix("file:"), "rb", buffering=0) as file:
            yield file
        return
    from webdataset.gopen import gopen

    if url.startswith("s3://"):
        url = f"pipe:aws s3 cp --quiet {shlex.quote(url)} -"
    reader = _TimedReader(gopen(url, "rb"), timeout_s)
    try:
        yield cast(BinaryIO, reader)
    finally:
        reader.close()


class Staging:
    """A folder of staged shards with a limit on its size."""

    def __init__(
        self, folder: str | Path, *, limit_bytes: float = 100e9, timeout_s: float = 300.0, retries: int = 3
    ) -> None:
        """
        Args:
            folder: node-local; made if absent.
            limit_bytes: size above which shards used longest ago leave.
            timeout_s: seconds without a byte after which a fetch failed; also the wait for another process's fetch
                without progress.
            retries: fetches after the first.
        """
        self.folder = Path(folder).expanduser()
        self.limit_bytes, self.timeout_s, self.retries = limit_bytes, timeout_s, retries
        self._pool: ThreadPoolExecutor | None = None
        self._pending: dict[str, Future[None]] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StagingError(f"cannot make the staging folder {self.folder}: {error.strerror}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None, "_pending": {}}

    def path(self, url: str, *, num_bytes: int, sha256: bytes) -> Path:
        """The local copy of a shard, fetched if it is not there. Marks it as used now.

        Raises:
            StagingError: it could not be fetched after all retries, or the disk is full.
            ShardChangedError: what was fetched has another size or checksum than the index says.
        """
        target = self.folder / f"{sha256.hex()[:16]}-{_file_name(url)}"
        pending = self._pending.pop(url, None)
        if pending is not None:
            wait([pending])  # what it failed at is tried again here
        if not _touch(target, num_bytes):
            self._fetch_locked(url, target, num_bytes, sha256)
        return target

    def prefetch(self, url: str, *, num_bytes: int, sha256: bytes) -> None:
        """Begin to fetch in the background; what fails is tried again by `path`, here or in the process that reads."""
        # What is over is forgotten: it may be read elsewhere, and after it left the folder it is fetched again.
        self._pending = {other: future for other, future in self._pending.items() if not future.done()}
        target = self.folder / f"{sha256.hex()[:16]}-{_file_name(url)}"
        if url in self._pending or target.exists():
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(2, thread_name_prefix="staging")
        self._pending[url] = self._pool.submit(self._fetch_locked, url, target, num_bytes, sha256)

    def close(self) -> None:
        """Wait for no more fetches."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._pending.clear()

    def _fetch_locked(self, url: str, target: Path, num_bytes: int, sha256: bytes) -> None:
        """Fetch unless another process does; then wait for it, as long as its file grows."""
        partial = target.with_name(f".{target.name}.part")
        with open(target.with_name(f".{target.name}.lock"), "a") as lock:
            self._acquire(lock.fileno(), partial, url)
            if _touch(target, num_bytes):
                return
            for attempt in range(self.retries + 1):
                try:
                    self._make_room(num_bytes)
                    self._fetch(url, partial, num_bytes, sha256)
                    os.replace(partial, target)
                    return
                except OSError as error:
                    self._give_up(url, error, last=attempt == self.retries)
                    time.sleep(min(2.0**attempt, 30.0) * min(1.0, self.timeout_s / 30))
                finally:
                    partial.unlink(missing_ok=True)

    def _give_up(self, url: str, error: OSError, *, last: bool) -> None:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise StagingError(
                f"cannot stage {url} to {self.folder}: {error.strerror}; free some space, lower loading.cache_gb, or "
                "choose another loading.cache_dir"
            ) from error
        if last:
            raise StagingError(
                f"cannot fetch {url} ({error.strerror or error}) after {self.retries + 1} attempts; check the network "
                "and the address, or raise loading.timeout_s and loading.retries"
            ) from error

    def _acquire(self, lock: int, partial: Path, url: str) -> None:
        seen, since = -1, time.monotonic()
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                size = partial.stat().st_size if partial.exists() else -1
            if size != seen:
                seen, since = size, time.monotonic()
            elif time.monotonic() - since > self.timeout_s * (self.retries + 2):
                raise StagingError(f"another process fetches {url} without progress; its lock lies in {self.folder}")
            time.sleep(0.02)

    def _fetch(self, url: str, partial: Path, num_bytes: int, sha256: bytes) -> None:
        digest, size = hashlib.sha256(), 0
        with open_stream(url, timeout_s=self.timeout_s) as source, open(partial, "wb") as target:
            while data := source.read(CHUNK):
                size += len(data)
                digest.update(data)
                target.write(data)
                target.flush()  # its growth is what waiting processes see
                if size > num_bytes:
                    break
        if size < num_bytes:
            raise OSError(errno.EIO, f"ended after {size} of {num_bytes} bytes")
        if size > num_bytes or digest.digest() != sha256:
            raise ShardChangedError(f"{url} is not the shard that was indexed: its size or checksum differs")

    def _make_room(self, num_bytes: int) -> None:
        """Unlink the shards used longest ago until `num_bytes` more fit. Several processes may do it at once.

        Nothing else in the folder is touched: the set's index may lie there, and files of the user's own.
        """
        shards = []
        for entry in os.scandir(self.folder):
            if STAGED.match(entry.name) and entry.is_file(follow_symlinks=False):
                try:
                    shards.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
                except FileNotFoundError:
                    continue
        total = sum(size for _, size, _ in shards) + num_bytes
        for _, size, path in sorted(shards):
            if total <= self.limit_bytes:
                return
            Path(path).unlink(missing_ok=True)
            total -= size


def _touch(path: Path, num_bytes: int) -> bool:
    """Mark as used now; False if it is not there in full."""
    try:
        os.utime(path)
        return path.stat().st_size == num_bytes
    except FileNotFoundError:
        return False


def _file_name(url: str) -> str:
    """The last piece of a URL as a harmless file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", url.split("?")[0].rstrip("/").rsplit("/", 1)[-1])[-80:] or "shard"
