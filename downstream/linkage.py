"""Average linkage of many images at once, with the dendrograms of fastcluster.

Owns: the compiled kernel (linkage.cpp; built once per machine and version, in under two seconds), the fall-back to
fastcluster where there is no compiler, and cutting dendrograms. Both compute in float64, so the labels equal
fastcluster's up to ties.

B images, N tokens, D features.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_SOURCE = Path(__file__).with_name("linkage.cpp")
# Parts of -ffast-math: the whole of it would flush subnormal numbers in the entire process once the library is loaded.
_MATH = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-ffinite-math-only")
_FLAGS = ("-O3", "-march=native", *_MATH, "-funroll-loops", "-std=c++17", "-shared", "-fPIC", "-pthread")


@dataclass(frozen=True)
class Dendrogram:
    """Merges of each image in rising order, numbered as SciPy does: tokens 0..N-1, merge m makes cluster N + m.

    Attributes:
        children: [B, N-1, 2] int64. heights: [B, N-1] float64, mean distances at which clusters merged.
    """

    children: Tensor
    heights: Tensor

    def cut(self, num_clusters: int) -> Tensor:
        """Labels [B, N] int64 from 0 of `num_clusters` clusters (of N, where there are fewer tokens)."""
        tokens = self.heights.shape[1] + 1
        kept = max(tokens - num_clusters, 0)
        return self._labels(torch.full((len(self.heights), 1), kept))

    def cut_at(self, distance: float) -> Tensor:
        """Labels [B, N] int64 of the clusters that merged at no more than `distance`; their number varies by image."""
        return self._labels((self.heights <= distance).sum(1, keepdim=True))

    def _labels(self, kept: Tensor) -> Tensor:
        """Labels when the first `kept` [B, 1] merges of each image are carried out."""
        images, merges = self.heights.shape
        tokens = merges + 1
        parent = torch.arange(tokens + merges).repeat(images, 1)
        merge = torch.arange(merges)
        made = torch.where(merge < kept, tokens + merge, -1)[:, :, None].expand(-1, -1, 2)
        children = self.children.reshape(images, -1)
        parent.scatter_(1, children, torch.where(made >= 0, made, self.children).reshape(images, -1))
        while not torch.equal(above := parent.gather(1, parent), parent):  # doubles the steps each time
            parent = above
        roots = parent[:, :tokens]
        is_root = torch.zeros_like(parent).scatter_(1, roots, 1)
        return (is_root.cumsum(1) - 1).gather(1, roots)


def average_linkage(features: Tensor, *, threads: int | None = None) -> Dendrogram:
    """Dendrograms of average linkage (Euclidean) over the tokens of each image.

    Args:
        features: [B, N, D] on any device; taken as float32, distances are float64.
        threads: images clustered at a time, each in about 10 N^2 bytes; default: torch's number of threads.

    Raises:
        ValueError: a feature is not finite.
    """
    if not bool(torch.isfinite(features).all()):
        broken = (~torch.isfinite(features)).flatten(1).any(1).nonzero().flatten().tolist()
        raise ValueError(f"features of images {broken[:8]} of the batch are not finite: the backbone diverged")
    images, tokens, _ = features.shape
    children = torch.empty(images, tokens - 1, 2, dtype=torch.int32)
    heights = torch.empty(images, tokens - 1, dtype=torch.float64)
    if tokens == 1 or not images:
        return Dendrogram(children.long(), heights)
    kernel = _kernel()
    if kernel is None:
        return _by_fastcluster(features)
    points = features.to("cpu", torch.float32).contiguous()
    kernel(
        points.data_ptr(), images, tokens, points.shape[2], children.data_ptr(), heights.data_ptr(),
        threads or torch.get_num_threads(),
    )  # fmt: skip
    return Dendrogram(children.long(), heights)


def _by_fastcluster(features: Tensor) -> Dendrogram:
    """The same by fastcluster, one image at a time."""
    import fastcluster

    trees = np.stack([fastcluster.linkage(image, "average") for image in features.double().cpu().numpy()])
    return Dendrogram(torch.from_numpy(trees[:, :, :2].astype(np.int64)), torch.from_numpy(trees[:, :, 2].copy()))


@functools.cache
def _kernel() -> ctypes._CFuncPtr | None:  # type: ignore[name-defined]
    """The compiled kernel; None, with one warning, where it cannot be built. AKORN_NO_KERNELS=1 does without."""
    if os.environ.get("AKORN_NO_KERNELS") == "1":
        return None
    try:
        library = ctypes.CDLL(str(_built()))
    except (OSError, subprocess.CalledProcessError) as error:
        warnings.warn(f"average linkage falls back to fastcluster, several times slower: {error}", stacklevel=2)
        return None
    kernel = library.average_linkage
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    kernel.argtypes, kernel.restype = [pointer, integer, integer, integer, pointer, pointer, integer], None
    return kernel


def _built() -> Path:
    """Path of the library for this source and processor; compiled at the first use, safe with several processes."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if compiler is None:
        raise OSError("no C++ compiler found (install g++ or set CXX)")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "akorn"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        cache = Path(tempfile.mkdtemp(prefix="akorn-"))
    source = _SOURCE.read_bytes()
    stamp = hashlib.sha256(source + " ".join((compiler, *_FLAGS, _processor())).encode()).hexdigest()[:16]
    library = cache / f"linkage-{stamp}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            built = Path(folder) / "linkage.so"
            subprocess.run([compiler, *_FLAGS, str(_SOURCE), "-o", str(built)], check=True, capture_output=True)
            os.replace(built, library)
    return library


def _processor() -> str:
    """What -march=native depends on: a home directory may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
