"""Calibration: does a classifier that says 80 % hold in 80 % of the cases?

Owns: the expected calibration error and the reliability diagram. Source: Guo, Pleiss, Sun, Weinberger, "On calibration
of modern neural networks", arXiv 1706.04599, eq. (3) and (5): ECE = sum_b |B_b| / N * |accuracy(B_b) - confidence(B_b)|
over equal-width bins of the confidence, 15 by convention.

Shapes: N images, K classes; probabilities [N, K], labels [N].
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

NUM_BINS = 15


@dataclass(frozen=True)
class Reliability:
    """Bins of equal width over the confidence, (low, high]: counts, mean accuracy and confidence of each [bins].

    Accuracy and confidence of an empty bin are nan.
    """

    counts: NDArray[np.int64]
    accuracy: NDArray[np.float64]
    confidence: NDArray[np.float64]

    @property
    def ece(self) -> float:
        """Expected calibration error, in [0, 1]."""
        filled = self.counts > 0
        gaps = np.abs(self.accuracy - self.confidence)[filled]
        return float((gaps * self.counts[filled]).sum() / self.counts.sum())

    @property
    def overconfidence(self) -> float:
        """Mean confidence minus accuracy, in [-1, 1]: positive where the classifier promises too much."""
        filled = self.counts > 0
        gaps = (self.confidence - self.accuracy)[filled]
        return float((gaps * self.counts[filled]).sum() / self.counts.sum())


def reliability(probabilities: ArrayLike, labels: ArrayLike, *, bins: int = NUM_BINS) -> Reliability:
    """Bin predictions by their confidence, the largest class probability.

    Args:
        probabilities: [N, K], rows sum to 1.
        labels: true classes [N].
    """
    chances, truth = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    confidence = chances.max(axis=1)
    correct = chances.argmax(axis=1) == truth
    # (low, high] as in the paper; the first bin takes 0 as well.
    numbers = np.clip(np.ceil(confidence * bins - 1e-12).astype(np.int64) - 1, 0, bins - 1)
    counts = np.bincount(numbers, minlength=bins)
    divisor = np.where(counts > 0, counts, np.nan)
    return Reliability(
        counts,
        np.bincount(numbers, weights=correct, minlength=bins) / divisor,
        np.bincount(numbers, weights=confidence, minlength=bins) / divisor,
    )


def brier(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean squared distance of the probabilities from the truth, in [0, 2]; a proper score, unlike ECE."""
    chances, truth = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    return float(((chances - np.eye(chances.shape[1])[truth]) ** 2).sum(axis=1).mean())


def negative_log_likelihood(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean -log p of the true class, in nats; probabilities below 1e-12 count as 1e-12."""
    chances, truth = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    return float(-np.log(chances[np.arange(len(truth)), truth].clip(1e-12)).mean())


def summary(draws: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Scores of probabilities from E starts [E, N, K], by single starts (their mean) and averaged over the starts.

    Returns: accuracy, ece, overconfidence, brier and nll, each as NAME (mean of single starts) and NAME_averaged.
    """
    chances = np.asarray(draws, dtype=np.float64)
    single = [_scores(one, labels) for one in chances]
    found = {name: float(np.mean([scores[name] for scores in single])) for name in single[0]}
    averaged = _scores(chances.mean(axis=0), labels)
    return found | {f"{name}_averaged": value for name, value in averaged.items()}


def draw(path: Path, curves: dict[str, Reliability]) -> None:
    """Write a reliability diagram: one panel for each curve, the share of predictions in each bin below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        2, len(curves), figsize=(3.6 * len(curves), 4.6), sharex=True, squeeze=False, height_ratios=(3, 1)
    )
    for column, (name, curve) in enumerate(curves.items()):
        edges = np.linspace(0, 1, len(curve.counts) + 1)
        width = edges[1]
        top, bottom = panels[0, column], panels[1, column]
        top.bar(edges[:-1], np.nan_to_num(curve.accuracy), width, align="edge", edgecolor="white", color="#3b6ea5")
        top.plot([0, 1], [0, 1], "--", color="0.4", linewidth=1)
        top.set(title=f"{name}\nECE {100 * curve.ece:.1f} %", ylim=(0, 1))
        bottom.bar(edges[:-1], curve.counts / curve.counts.sum(), width, align="edge", edgecolor="white", color="0.6")
        bottom.set(xlabel="confidence", xlim=(0, 1))
    panels[0, 0].set_ylabel("accuracy")
    panels[1, 0].set_ylabel("share")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _scores(probabilities: NDArray[np.float64], labels: ArrayLike) -> dict[str, float]:
    """All scores of one set of probabilities [N, K]."""
    bins = reliability(probabilities, labels)
    return {
        "accuracy": float((probabilities.argmax(axis=1) == np.asarray(labels)).mean()),
        "ece": bins.ece,
        "overconfidence": bins.overconfidence,
        "brier": brier(probabilities, labels),
        "nll": negative_log_likelihood(probabilities, labels),
    }
