"""What tests hand to sources of images, and what they take from them."""

from __future__ import annotations

import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.sources.sample import Request, Sample

SHARED = Path(os.environ.get("AKORN_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def request(path: Path, tmp_path: Path, **more: Any) -> Request:
    return Request(path, tmp_path / "temporary", **more)


def samples_of(source: Any) -> list[Sample]:
    found = list(pickle.loads(pickle.dumps(source)).read(np.arange(len(source))))
    assert all(isinstance(sample, Sample) for sample in found)
    return found


def tar_of(folder_: Path, mode: str, path: Path) -> Path:
    with tarfile.open(path, mode) as tar:
        tar.add(folder_, arcname=folder_.name)
    return path


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/evil-was-here",)
