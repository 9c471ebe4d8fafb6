"""Paths of a configuration made absolute, so that a run goes on whatever folder it is resumed from.

Owns: which keys hold paths, and what counts as a path (not a URL, a pipe or the name of a timm model).
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any, TypeVar

from configs.section import Section

Config = TypeVar("Config", bound=Section)

_PATHS = frozenset(
    {
        "shards",
        "init_from",
        "runs_dir",
        "knn_train",
        "knn_test",
        "objects_data",
        "cache_dir",
        "cifar10c",
        "data",
        "train",
        "out",
    }
)
# A path if there is such a file, else a model's name.
_MAYBE_PATHS = frozenset({"ckpt", "also", "transfer_from", "image"})
_URL = re.compile(r"^(?:[A-Za-z0-9+.-]+://|pipe:|hf[-_]hub:)")
_BEFORE_A_PATH = re.compile(r"^(?:file|local-dir):(?!//)")


def located(config: Config) -> Config:
    """The same configuration, or section of one, with absolute paths."""
    update: dict[str, Any] = {}
    for key, value in config:
        if isinstance(value, Section):
            update[key] = located(value)
        elif isinstance(value, tuple) and value and isinstance(value[0], Section):
            update[key] = tuple(located(item) for item in value)
        elif key in _PATHS or key in _MAYBE_PATHS:
            is_list = isinstance(value, tuple)
            items = [_located_item(key, item) for item in (value if is_list else (value,))]
            update[key] = tuple(items) if is_list else items[0]
    return config.model_copy(update=update)


def _located_item(key: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    is_path = key in _PATHS or _BEFORE_A_PATH.match(value) or os.path.exists(os.path.expanduser(value))
    return absolute(value) if is_path else value


def absolute(path: str) -> str:
    """An absolute path; URLs, pipes and hub names stay as they are, `file:` and `local-dir:` stay in front."""
    if _URL.match(path):
        return path
    match = _BEFORE_A_PATH.match(path)
    start = match.end() if match else 0
    return path[:start] + os.path.abspath(os.path.expanduser(path[start:]))


def shown(path: str | os.PathLike[str]) -> str:
    """A path as a person would write it: relative to here where that is inside."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def command_on(command: str, home: Path) -> str:
    """The command on a run, as it works from here: by the run's name where that finds it."""
    found = home.absolute().parent == Path("runs").absolute()
    return f"python cluster/launch.py {command} {shlex.quote(home.name if found else shown(home))}"
