"""Clustering and scoring against the way the published evaluation works, on identical features.

    python tests/benchmarks/clustering.py [--grid 8 16 64] [--images 1000 1000 100] [--threads 2]

The baseline takes the features as they are (in memory) and treats an image at a time in one process: scikit-learn PCA,
fastcluster's average linkage on the vectors, SciPy's cut, nearest enlargement, scikit-learn's Rand index and a loop
over objects for MBO. Ours takes the same features in batches. Both are timed in turns, in one run; labels are compared.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import fastcluster
import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score

from downstream import metrics
from downstream.grouping import Grouping, group

COMPONENTS, CLUSTERS, PIXELS_PER_TOKEN = 128, 7, {8: 4, 16: 8, 64: 4}


def scenes(images: int, grid: int, channels: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features [B, C, h, w] of a few smooth regions with noise, and true labels [B, H, W]."""
    generator = np.random.default_rng(seed)
    places = np.stack(np.meshgrid(np.arange(grid), np.arange(grid), indexing="ij"), -1)
    centres = generator.uniform(0, grid, (images, CLUSTERS, 2))
    regions = ((places[None, :, :, None] - centres[:, None, None]) ** 2).sum(-1).argmin(-1)
    palette = generator.normal(size=(images, CLUSTERS, channels))
    features = np.take_along_axis(palette, regions.reshape(images, -1)[..., None], axis=1)
    features = features + 0.7 * generator.normal(size=features.shape)
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    scale = PIXELS_PER_TOKEN.get(grid, 4)
    truth = regions.repeat(scale, 1).repeat(scale, 2)
    return features.astype(np.float32).reshape(images, grid, grid, channels).transpose(0, 3, 1, 2), truth


def mean_best_overlap(truth: np.ndarray, prediction: np.ndarray) -> float:
    segments = [prediction == label for label in np.unique(prediction)]
    best = []
    for label in np.unique(truth[truth > 0]):
        mask = truth == label
        best.append(max((mask & segment).sum() / (mask | segment).sum() for segment in segments))
    return float(np.mean(best))


def one_at_a_time(features: np.ndarray, truth: np.ndarray) -> tuple[list[np.ndarray], list[float], list[float]]:
    labels, ari, mbo = [], [], []
    size = truth.shape[1:]
    for image, masks in zip(features, truth):
        channels, height, width = image.shape
        tokens = image.reshape(channels, -1).T
        if channels > COMPONENTS:
            tokens = PCA(min(COMPONENTS, *tokens.shape)).fit_transform(tokens)
        segments = fcluster(fastcluster.linkage(tokens, "average"), CLUSTERS, "maxclust").reshape(height, width)
        labels.append(segments)
        large = torch.nn.functional.interpolate(torch.from_numpy(segments)[None, None].float(), size=size)
        prediction = large[0, 0].long().numpy()
        inside = masks > 0
        ari.append(adjusted_rand_score(masks[inside], prediction[inside]))
        mbo.append(mean_best_overlap(masks, prediction))
    return labels, ari, mbo


def batched(features: torch.Tensor, truth: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    segments, scores = [], []
    for start in range(0, len(features), 64):
        part = group(features[start : start + 64], Grouping(clusters=CLUSTERS, components=COMPONENTS))
        segments.append(part)
        scores.append(metrics.score(truth[start : start + 64], part))
    return torch.cat(segments), {name: torch.cat([one[name] for one in scores]) for name in scores[0]}


def compare(grid: int, images: int, channels: int, rounds: int) -> None:
    features, truth = scenes(images, grid, channels, seed=grid)
    tensors = torch.from_numpy(features), torch.from_numpy(truth)
    batched(tensors[0][:2], tensors[1][:2])  # builds the kernel
    ours, theirs = [], []
    for piece in range(rounds):
        part = slice(piece * images // rounds, (piece + 1) * images // rounds)
        begin = np.array([time.perf_counter(), time.process_time()])
        segments, scores = batched(tensors[0][part], tensors[1][part])
        middle = np.array([time.perf_counter(), time.process_time()])
        labels, ari, mbo = one_at_a_time(features[part], truth[part])
        ours.append(middle - begin)
        theirs.append(np.array([time.perf_counter(), time.process_time()]) - middle)
        assert np.allclose(mbo, scores["mbo_i"].numpy(), atol=0.05)
        equal = [adjusted_rand_score(a.ravel(), b.numpy().ravel()) == 1 for a, b in zip(labels, segments)]
        gap = float(np.abs(np.array(ari) - scores["fg_ari"].numpy()).max())
        print(f"  {np.mean(equal):.1%} of images with equal labels, largest difference of FG-ARI {gap:.1e}", flush=True)
    for clock, single, many in zip(("elapsed", "processor"), sum(theirs), sum(ours)):
        print(
            f"grid {grid} x {grid}, {channels} channels, {images} images, {clock} time: one at a time {single:.2f} s, "
            f"batched {many:.2f} s, ratio {single / many:.1f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 1000, 100])
    parser.add_argument("--channels", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--rounds", type=int, default=4, help="turns that the two take")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for grid, images in zip(arguments.grid, arguments.images):
        for channels in arguments.channels:
            compare(grid, images, channels, arguments.rounds)


if __name__ == "__main__":
    main()
