"""Features of a whole data set in one file, computed once by all processes together.

Owns: the file (rows.npy [N, D] float32 in the order of the data set), columns.json with the names of the columns and a
description, and done_*.txt, in which each process notes the blocks that it has finished, so that an interrupted
extraction goes on where it was. Nothing is mapped while it is written: processes of several nodes may share NFS.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from configs.errors import UserError
from downstream import results
from downstream.encoder import Encoder
from downstream.samples import Samples

PIXEL_SIDE = 32  # raw pixels are taken at this size at most


@dataclass(frozen=True)
class Table:
    """Attributes: rows [N, D] float32, mapped; columns: name -> (first, last + 1)."""

    rows: np.ndarray
    columns: Mapping[str, tuple[int, int]]

    def take(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """The columns of one kind of features, or of `all`, as a tensor [N, d]."""
        first, last = (0, self.rows.shape[1]) if name == "all" else self.columns[name]
        return torch.from_numpy(np.ascontiguousarray(self.rows[:, first:last])).to(device)


def kinds_of(encoder: Encoder, images: Tensor, kinds: tuple[str, ...], *, start_seed: int = 0) -> dict[str, Tensor]:
    """Features of a batch by kind, each [B, d].

    pooled: as the model pools its last map; avg, max: pooled over the map; oscillators: the state before the last
    readout, averaged over tokens; pixels: the image itself.
    """
    found: dict[str, Tensor] = {}
    if set(kinds) - {"pixels"}:
        features = encoder.encode(images, start_seed=start_seed, oscillators="oscillators" in kinds)
        found["pooled"] = features.pooled
        found["avg"], found["max"] = features.map.mean((2, 3)), features.map.amax((2, 3))
        if features.oscillators is not None:
            found["oscillators"] = features.oscillators.mean((2, 3))
    if "pixels" in kinds:
        found["pixels"] = pixels_of(images)
    return {kind: found[kind] for kind in kinds}


def pixels_of(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] as vectors, averaged down to PIXEL_SIDE where they are larger."""
    if images.shape[-1] > PIXEL_SIDE:
        images = F.adaptive_avg_pool2d(images, PIXEL_SIDE)
    return images.flatten(1)


def extract(
    folder: Path,
    samples: Samples,
    compute: Callable[[Tensor, list[int]], dict[str, Tensor]],
    *,
    resize: int,
    size: int,
    batch_size: int,
    description: dict[str, Any],
) -> Table | None:
    """Features of all samples; each process computes its share of the blocks.

    Args:
        folder: of this table: its name must say what the features depend on (`results.key_of`).
        compute: images [B, 3, size, size] in [0, 1] and their positions -> features by kind.

    Returns:
        The table on rank 0, which waits for the others; None on the others.

    Raises:
        UserError: a feature is not finite.
    """
    rank, world_size = results.ranks()
    blocks = samples.blocks(batch_size)
    if rank == 0 and not (folder / "columns.json").exists():
        first = compute(samples.images(blocks[0][:1], resize=resize, size=size), [0])
        _create(folder, len(samples), {kind: rows.shape[1] for kind, rows in first.items()}, description)
    results.wait_for((folder / "columns.json").exists, 600, f"the table of features in {folder}")
    done = _done(folder)
    missing = [block for block in range(rank, len(blocks), world_size) if block not in done]
    note = _note(folder)
    for block, images in _read_ahead(missing, lambda block: samples.images(blocks[block], resize=resize, size=size)):
        rows = torch.cat(list(compute(images, list(blocks[block])).values()), dim=1).cpu().numpy()
        if not np.isfinite(rows).all():
            raise UserError("features are not finite: the backbone diverged or its weights are damaged")
        _write(folder, blocks[block].start, rows)
        with open(note, "a") as file:
            file.write(f"{block}\n")
    if rank != 0:
        return None
    results.wait_for(lambda: len(_done(folder)) == len(blocks), 24 * 3600, f"features in {folder}")
    columns = json.loads((folder / "columns.json").read_text())["columns"]
    return Table(_mapped(folder), {kind: (first, last) for kind, (first, last) in columns.items()})


def _read_ahead(blocks: Sequence[int], read: Callable[[int], Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Blocks and their images; the next are read and decoded while the caller computes."""
    with ThreadPoolExecutor(1) as reader:
        reading = [reader.submit(read, block) for block in blocks[:1]]
        for place, block in enumerate(blocks):
            reading += [reader.submit(read, following) for following in blocks[place + 1 : place + 2]]
            yield block, reading.pop(0).result()


def _create(folder: Path, count: int, widths: dict[str, int], description: dict[str, Any]) -> None:
    """Make the files; columns.json comes last and says that the other is there."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("done_*.txt"):
        left.unlink()
    partial = folder / f".rows.{os.getpid()}.npy"
    np.lib.format.open_memmap(partial, mode="w+", dtype="float32", shape=(count, sum(widths.values()))).flush()
    os.replace(partial, folder / "rows.npy")
    ends = np.cumsum(list(widths.values())).tolist()
    columns = {kind: (end - width, end) for (kind, width), end in zip(widths.items(), ends)}
    results.write_json(folder / "columns.json", {"columns": columns, **description})


def _mapped(folder: Path) -> np.memmap:
    """The rows as they are now; writing to them changes no file."""
    return np.lib.format.open_memmap(folder / "rows.npy", mode="c")


def _write(folder: Path, first: int, rows: np.ndarray) -> None:
    """Put rows [b, D] float32 into the file, from row `first` on."""
    with open(folder / "rows.npy", "r+b") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        file.seek(first * rows[0].nbytes, os.SEEK_CUR)
        file.write(rows.astype(np.float32, copy=False).tobytes())
        file.flush()
        os.fsync(file.fileno())


def _note(folder: Path) -> Path:
    """A new file for the blocks that this process finishes."""
    handle, name = tempfile.mkstemp(dir=folder, prefix="done_", suffix=".txt")
    os.close(handle)
    return Path(name)


def _done(folder: Path) -> set[int]:
    """Blocks that some process has finished."""
    texts = [path.read_text() for path in folder.glob("done_*.txt")]
    return {int(line) for text in texts for line in text.split("\n")[:-1]}  # after the last newline: half a number
