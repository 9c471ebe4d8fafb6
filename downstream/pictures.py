"""Pictures of segmentations: image, truth and predictions side by side.

Owns: colours of segments (matched to the truth's, so that the eye can compare) and the sheets that are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from downstream.metrics import IGNORE

# Okabe-Ito colours and lighter mixtures of them: told apart by most eyes, and in print.
PALETTE = np.array(
    [
        (30, 30, 34), (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0),
        (204, 121, 167), (153, 153, 153), (245, 208, 130), (170, 217, 244), (120, 205, 180), (150, 190, 225),
        (236, 170, 120), (230, 190, 211), (110, 80, 160),
    ],
    dtype=np.uint8,
)  # fmt: skip
_IGNORED = np.array((255, 255, 255), dtype=np.uint8)
_CELL_INCHES = 1.35


def colours(labels: Tensor) -> np.ndarray:
    """Labels [H, W] -> uint8 [H, W, 3]; 0 is dark, ignored pixels are white."""
    values = labels.numpy()
    picture = PALETTE[np.where(values > 0, (values - 1) % (len(PALETTE) - 1) + 1, 0)]
    picture[values == IGNORE] = _IGNORED
    return picture


def matched(prediction: Tensor, truth: Tensor) -> Tensor:
    """Predicted segments [H, W] renamed after the true labels (background included) that they overlap most;
    as they are where all of the truth is ignored."""
    known = truth.unique()
    known = known[known != IGNORE]
    if not len(known):
        return prediction
    names = torch.arange(int(prediction.max()) + 1)
    overlap = torch.stack([torch.stack([((prediction == p) & (truth == t)).sum() for t in known]) for p in names])
    rows, columns = linear_sum_assignment(overlap.numpy(), maximize=True)
    renamed = torch.full_like(names, -1)
    renamed[torch.from_numpy(rows)] = known[torch.from_numpy(columns)]
    free = iter(range(int(known.max()) + 1, int(known.max()) + len(names) + 1))
    for name in names.tolist():
        if renamed[name] < 0:
            renamed[name] = next(free)
    return renamed[prediction]


def overlay(image: Tensor, segments: Tensor) -> np.ndarray:
    """An image [3, H, W] tinted by its segments [H, W], with their borders drawn: uint8 [H, W, 3]."""
    photo = (image.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    tint = colours(segments + 1)
    mixed = (0.55 * photo + 0.45 * tint).astype(np.uint8)
    edge = np.zeros(segments.shape, dtype=bool)
    edge[:, 1:] |= (segments[:, 1:] != segments[:, :-1]).numpy()
    edge[1:] |= (segments[1:] != segments[:-1]).numpy()
    mixed[edge] = 255
    return mixed


def sheet(
    path: Path,
    images: Tensor,
    columns: Mapping[str, Tensor],
    *,
    truth: Tensor | None = None,
    notes: list[str] | None = None,
) -> Path:
    """Write a PNG with a row per image.

    Args:
        images: [B, 3, H, W] in [0, 1]. truth: [B, H, W], drawn second. columns: title -> segments [B, H, W].
        notes: a line for each row, written at its left.
    """
    from matplotlib.figure import Figure

    titles = ["image", *(["truth"] if truth is not None else []), *columns]
    figure = Figure(figsize=(_CELL_INCHES * len(titles) + 0.6, _CELL_INCHES * len(images) + 0.4), dpi=110)
    cells = figure.subplots(len(images), len(titles), squeeze=False)
    for row, image in enumerate(images):
        pictures = [(image.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()]
        if truth is not None:
            pictures.append(colours(truth[row]))
        shown = [labels[row] for labels in columns.values()]
        pictures.extend(colours(labels if truth is None else matched(labels, truth[row])) for labels in shown)
        for cell, picture in zip(cells[row], pictures):
            cell.imshow(picture, interpolation="nearest")
            cell.set_xticks([])
            cell.set_yticks([])
            for side in cell.spines.values():
                side.set_visible(False)
        if notes is not None:
            cells[row][0].set_ylabel(notes[row], fontsize=7)
    for cell, title in zip(cells[0], titles):
        cell.set_title(_wrapped(title), fontsize=7.5)
    figure.tight_layout(pad=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _wrapped(title: str, width: int = 18) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(title, width))
