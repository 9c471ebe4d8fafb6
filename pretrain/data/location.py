"""Location: where the tars of a shard set are. Folder, brace pattern, list; local paths or URLs."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError

SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:")
MAX_SHARDS = 10_000_000


def is_remote(url: str) -> bool:
    """Whether webdataset's gopen must fetch it: any scheme but `file:`."""
    return SCHEME.match(url) is not None and not url.startswith("file:")


@dataclass(frozen=True)
class Location:
    """Shards of a set in order.

    Attributes:
        base: folder or URL prefix that precedes each name.
        joined: the names, joined by newlines (one string: small in memory and quick to hand to workers).
        folder: the local folder that holds exactly these shards, if there is one.
    """

    base: str
    joined: str
    folder: str | None = None

    @classmethod
    def find(cls, location: str | Path | Sequence[str]) -> Location:
        """Expand a folder, a pattern or a list of them.

        Raises:
            UserError: nothing there, or a name twice.
        """
        items = [str(location)] if isinstance(location, (str, Path)) else [str(item) for item in location]
        if len(items) == 1 and "{" not in items[0] and not is_remote(items[0]):
            folder = Path(items[0].removeprefix("file:")).expanduser()
            if folder.is_dir():
                return cls._of_folder(folder)
        urls = [url for item in items for url in _expand(item)]
        missing = _missing(urls)
        if missing is not None:
            raise UserError(f"no shards at {missing}; make them with pretrain/make_shards.py, or correct the path")
        base = urls[0][: urls[0].rfind("/") + 1]
        while not all(url.startswith(base) for url in urls):
            base = base[: base[:-1].rfind("/") + 1]
        names = [url[len(base) :] for url in urls]
        if len(set(names)) < len(names) or any("\n" in name for name in names):
            raise UserError(f"a shard is listed twice in {', '.join(items)[:200]}")
        return cls(base, "\n".join(names))

    @classmethod
    def _of_folder(cls, folder: Path) -> Location:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".tar") and name[0] != ".")
        if not names:
            inside = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
            hint = f" (did you mean {folder / inside[0]}?)" if inside else ""
            raise UserError(f"no *.tar in {folder}{hint}; make them with pretrain/make_shards.py")
        # make_shards.py puts .building away last, behind info.json.
        if (folder / ".building" / "plan.json").is_file() and not (folder / "info.json").is_file():
            raise UserError(
                f"{folder} is not finished: its make_shards.py still runs or was interrupted; the same command goes on "
                f"(to use the {len(names)} shards that are there, remove {folder / '.building'})"
            )
        return cls(f"{folder.resolve()}/", "\n".join(names), str(folder.resolve()))

    @property
    def names(self) -> list[str]:
        return self.joined.split("\n")

    def __len__(self) -> int:
        return self.joined.count("\n") + 1

    @property
    def digest(self) -> str:
        """Names the set in a cache folder."""
        return hashlib.sha256(f"{self.base}\n{self.joined}".encode()).hexdigest()[:16]

    def local_sizes(self) -> Iterator[tuple[int, int]]:
        """(shard, bytes) of the shards that are local files; a missing one has -1 bytes."""
        for shard, name in enumerate(self.names):
            if not is_remote(self.base + name):
                try:
                    yield shard, os.stat(self.base + name).st_size
                except OSError:
                    yield shard, -1


def _missing(urls: Sequence[str]) -> str | None:
    """The first local shard that is not there. Folders are listed, not shards looked at: each rank does this."""
    local = [(*os.path.split(url), url) for url in urls if not is_remote(url)]
    folders = {folder for folder, _, _ in local if os.access(folder, os.R_OK)}
    listed = {folder: set(os.listdir(folder)) for folder in folders}
    absent = (url for folder, name, url in local if name not in listed.get(folder, ()))
    return next((url for url in absent if not os.path.isfile(url)), None)


def _expand(item: str) -> list[str]:
    import braceexpand

    path = item.removeprefix("file:")
    if not is_remote(path):
        path = os.path.abspath(os.path.expanduser(path))
    try:
        urls = list(braceexpand.braceexpand(path)) if "{" in path else [path]
    except ValueError as error:
        raise UserError(f"data.shards: {item!r} is no brace pattern ({error}); write name-{{000..099}}.tar") from error
    if len(urls) > MAX_SHARDS:
        raise UserError(f"data.shards: {item!r} stands for {len(urls)} shards; at most {MAX_SHARDS}")
    return urls
