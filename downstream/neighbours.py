"""Weighted k-nearest-neighbour classification of frozen features, exact, through faiss.

Owns: the classifier of Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (arXiv
1805.01978, section 3.4), in the form that DINO evaluates: cosine similarity s, weights exp(s / T), T = 0.07.

N training features, Q queries, D channels, G classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_QUERIES = 4096  # queries searched at a time: bounds the scores [Q, G] and the neighbours
# Features to search in from which a GPU does it. faiss takes 1.5 GB there, which a GPU that trains may not have left.
LEAST_ON_GPU = 100_000


def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    neighbours: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
) -> dict[int, dict[str, float]]:
    """Accuracy for each number of neighbours (more than there are: all): {k: {"top1", "top5"}} in [0, 1].

    Args:
        train: [N, D]. train_labels: [N] int64 from 0. test: [Q, D]. test_labels: [Q].
    """
    if not neighbours:
        return {}
    numbers = sorted(set(neighbours))
    classes = int(max(int(train_labels.max()), int(test_labels.max()))) + 1
    correct = {k: np.zeros(2) for k in numbers}
    for start in range(0, len(test), _QUERIES):
        part, answer = test[start : start + _QUERIES], test_labels[start : start + _QUERIES]
        similarity, index = nearest(train, part, min(numbers[-1], len(train)))
        votes = torch.zeros(len(part), classes)
        # Relative to the nearest one's: exp(1 / T) is infinite in float from T = 0.011 on.
        weights, labels = ((similarity - similarity[:, :1]) / temperature).exp(), train_labels[index]
        done = 0
        for k in numbers:  # the votes of k neighbours are those of fewer, and a few more
            votes.scatter_add_(1, labels[:, done:k], weights[:, done:k])
            done = k
            ranked = votes.topk(min(5, classes), dim=1).indices == answer[:, None]
            correct[k] += [int(ranked[:, 0].sum()), int(ranked.any(1).sum())]
    return {k: {"top1": float(hits[0] / len(test)), "top5": float(hits[1] / len(test))} for k, hits in correct.items()}


def nearest(base: Tensor, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cosine similarities [Q, count] falling, and positions [Q, count] in `base`; of many on a GPU, if there is one."""
    import faiss

    vectors = [np.ascontiguousarray(F.normalize(one.float(), dim=1).cpu().numpy()) for one in (queries, base)]
    if len(base) >= LEAST_ON_GPU and faiss.get_num_gpus() > 0:
        similarity, index = faiss.knn_gpu(
            faiss.StandardGpuResources(), vectors[0], vectors[1], count, metric=faiss.METRIC_INNER_PRODUCT
        )
    else:
        similarity, index = faiss.knn(vectors[0], vectors[1], count, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(similarity), torch.from_numpy(index)
