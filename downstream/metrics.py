"""Scores of a segmentation against the truth, for many images at once.

Owns: the table of shared pixels of each image, and every score computed from it: FG-ARI, ARI, MBO, mIoU.

Protocol of "Artificial Kuramoto Oscillatory Neurons" (arXiv 2410.13821): truth 0 is background, IGNORE (-1) is
ignored, 1.. are objects. FG-ARI counts pixels with truth > 0. MBO takes for each object the best IoU over the predicted
segments; background is no object, and ignored pixels are removed from the predictions. Images for which a score is not
defined (no object) give NaN: they are skipped and counted, never scored.

B images, G true labels, P predicted segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from downstream.grouping import enlarge

IGNORE = -1
_LARGEST_TABLE = 1024  # labels above this are renumbered per image, so that tables stay small


@dataclass(frozen=True)
class Overlap:
    """Pixels shared by true labels and predicted segments.

    Attributes:
        objects: [B, G, P] pixels of true object g in segment p (labels without pixels are rows of zeros).
        background: [B, P] pixels of the background in segment p.
    """

    objects: Tensor
    background: Tensor


def overlap(truth: Tensor, prediction: Tensor) -> Overlap:
    """Count the shared pixels.

    Args:
        truth: [B, H, W] integers; 0 background, -1 ignored, 1.. objects.
        prediction: [B, H, W] integers from 0, or [B, h, w] on a grid of tokens, enlarged by nearest neighbour.

    Raises:
        ValueError: the shapes do not fit or a label is out of range.
    """
    coarser = all(small <= large for small, large in zip(prediction.shape[1:], truth.shape[1:]))
    if truth.ndim != 3 or prediction.ndim != 3 or len(truth) != len(prediction) or not coarser:
        raise ValueError(f"truth {tuple(truth.shape)} and prediction {tuple(prediction.shape)} must both be [B, H, W]")
    if truth.numel() == 0 or prediction.numel() == 0:
        raise ValueError("no pixels to score")
    grid, size = prediction.shape[1:], truth.shape
    truth, prediction = _compact(truth.flatten(1)), _compact(prediction.flatten(1))
    if int(truth.min()) < IGNORE or int(prediction.min()) < 0:
        raise ValueError("true labels start at -1 (ignore), predicted segments at 0")
    num_segments = int(prediction.max()) + 1
    labels = truth + 1  # 0: ignored, 1: background
    if grid == size[1:]:
        counts = tally(labels, prediction, num_segments)
    else:
        tokens = by_token(labels.view(size), (grid[0], grid[1]))
        counts = tokens.new_zeros(*tokens.shape[:2], num_segments)
        counts.scatter_add_(2, prediction[:, None].expand_as(tokens), tokens)
    counts = F.pad(counts, (0, 0, 0, max(0, 3 - counts.shape[1])))  # a row for objects even where there are none
    return Overlap(objects=counts[:, 2:], background=counts[:, 1])


def by_token(labels: Tensor, grid: tuple[int, int]) -> Tensor:
    """How many pixels of each label lie in each token of a grid: [B, H, W] from 0 -> [B, labels, h * w]."""
    tokens = torch.arange(grid[0] * grid[1], device=labels.device).view(1, *grid)
    places = enlarge(tokens, (labels.shape[1], labels.shape[2])).flatten(1)
    return tally(labels.flatten(1), places, grid[0] * grid[1])


def tally(labels: Tensor, places: Tensor, num_places: int) -> Tensor:
    """How often each label [B, M] stands at each place [B, M] or [1, M], from 0: [B, labels (>= 2), num_places]."""
    images, count = len(labels), max(int(labels.max()), 1) + 1
    cell = torch.add(places, labels, alpha=num_places)
    cell += torch.arange(images, device=labels.device)[:, None] * (count * num_places)
    return torch.bincount(cell.flatten(), minlength=images * count * num_places).view(images, count, num_places)


def _compact(labels: Tensor) -> Tensor:
    """int64 labels; positive ones renumbered per image where they are large, order and equality kept."""
    labels = labels.long()
    if int(labels.max()) < _LARGEST_TABLE:
        return labels
    rows = [torch.unique(row.clamp_min(0), return_inverse=True) for row in labels]
    shifted = [inverse + (0 if values[0] == 0 else 1) for values, inverse in rows]
    return torch.where(labels > 0, torch.stack(shifted), labels)


def fg_ari(shared: Overlap) -> Tensor:
    """Adjusted Rand index over the pixels of objects, [B] float64; NaN without objects."""
    return adjusted_rand(shared.objects)


def ari(shared: Overlap) -> Tensor:
    """Adjusted Rand index over all pixels that are not ignored, the background being one more label, [B] float64."""
    return adjusted_rand(torch.cat([shared.background[:, None], shared.objects], dim=1))


def adjusted_rand(table: Tensor) -> Tensor:
    """Adjusted Rand index of contingency tables [B, G, P] (Hubert and Arabie, 1985), [B] float64.

    1 where both partitions are one cluster or both are singletons, as in scikit-learn; NaN for empty tables.
    """
    table = table.double()
    total = table.sum((1, 2))
    pairs, rows, columns = _pairs(table).sum((1, 2)), _pairs(table.sum(2)).sum(1), _pairs(table.sum(1)).sum(1)
    expected = rows * columns / _pairs(total).clamp_min(1)
    largest = (rows + columns) / 2
    same = (pairs == rows) & (pairs == columns)
    score = torch.where(same, 1.0, (pairs - expected) / torch.where(same, 1.0, largest - expected))
    return torch.where(total > 0, score, torch.nan)


def _pairs(counts: Tensor) -> Tensor:
    return counts * (counts - 1) / 2


def iou(shared: Overlap) -> Tensor:
    """Intersection over union of each object and segment, [B, G, P] float64; NaN rows for labels without pixels."""
    objects = shared.objects.double()
    size = objects.sum(2, keepdim=True)
    segment = objects.sum(1, keepdim=True) + shared.background[:, None]  # without ignored pixels
    return torch.where(size > 0, objects / (size + segment - objects), torch.nan)


def mbo(shared: Overlap) -> Tensor:
    """Mean best overlap, [B] float64: over objects, the best IoU over segments; NaN without objects."""
    return iou(shared).amax(2).nanmean(1)


def miou(shared: Overlap) -> Tensor:
    """Mean IoU over objects under the best one-to-one assignment of segments (Hungarian), [B] float64.

    Objects that get no segment count 0; NaN without objects.
    """
    scores = []
    for table in iou(shared).cpu().numpy():
        table = table[~np.isnan(table[:, 0])]
        rows, columns = linear_sum_assignment(table, maximize=True)
        scores.append(table[rows, columns].sum() / len(table) if len(table) else np.nan)
    return torch.tensor(scores, dtype=torch.float64)


def num_objects(shared: Overlap) -> Tensor:
    """Objects with pixels, [B]."""
    return (shared.objects.sum(2) > 0).sum(1)


def score(truth: Tensor, prediction: Tensor, classes: Tensor | None = None) -> dict[str, Tensor]:
    """All scores of a batch, each [B] float64 on the CPU, NaN where not defined.

    Args:
        truth: [B, H, W] instances. prediction: [B, H, W] or [B, h, w] segments. classes: [B, H, W] semantic
            labels, for mbo_c.

    Returns:
        fg_ari, fg_ari_2 (images with two or more objects only), ari, mbo_i, miou and, with classes, mbo_c.
    """
    shared = overlap(truth, prediction)
    shared = Overlap(shared.objects.cpu(), shared.background.cpu())
    foreground, objects = fg_ari(shared), num_objects(shared)
    scores = {
        "fg_ari": foreground,
        "fg_ari_2": torch.where(objects >= 2, foreground, torch.nan),
        "ari": torch.where(objects > 0, ari(shared), torch.nan),  # of the background alone it is 0 or 1, for nothing
        "mbo_i": mbo(shared),
        "miou": miou(shared),
    }
    if classes is not None:
        semantic = overlap(classes, prediction)
        scores["mbo_c"] = mbo(Overlap(semantic.objects.cpu(), semantic.background.cpu()))
    return scores
