"""Heads, neighbours and calibration against scikit-learn, autograd and closed forms."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

from downstream import probe
from downstream.neighbours import knn_accuracy


def clouds(count: int = 600, classes: int = 4, channels: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, channels, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, classes, (count,), generator=generator)
    return centres[labels] * 2 + 1.2 * torch.randn(count, channels, generator=generator), labels


def test_gradient_of_all_heads_equals_autograd() -> None:
    _, labels = clouds(32)
    logits = torch.randn(4, 3, 32, requires_grad=True)
    loss = sum(F.cross_entropy(logits[:, head].mT, labels) for head in range(3))
    (expected,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(probe._error(logits.detach(), labels), expected)


def test_statistics_are_those_of_the_columns() -> None:
    features = torch.randn(9000, 3) * torch.tensor([1.0, 1e-3, 50.0]) + torch.tensor([0.0, 100.0, -7.0])
    mean, scale = probe._statistics(features)
    torch.testing.assert_close(mean.double(), features.double().mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(1 / scale.double(), features.double().std(0), rtol=1e-2, atol=1e-6)


def test_heads_trained_together_equal_heads_trained_alone() -> None:
    features, labels = clouds()
    together = probe.train(features, labels, rates=[0.01, 0.1], classes=4, epochs=3, batch_size=100)
    alone = probe.train(features, labels, rates=[0.1], classes=4, epochs=3, batch_size=100)
    torch.testing.assert_close(together.logits(features)[:, 1], alone.logits(features)[:, 0], rtol=1e-4, atol=1e-5)


def test_probe_reaches_the_bayes_classifier() -> None:
    features, labels = clouds(4000)
    test_features, test_labels = clouds(1000, seed=1)
    heads = probe.train(features, labels, rates=[1e-3, 0.1], classes=4, epochs=10)
    centres = torch.stack([features[labels == label].mean(0) for label in range(4)])
    bayes = (torch.cdist(test_features, centres).argmin(1) == test_labels).float().mean()
    accuracy = probe.evaluate(heads, test_features, test_labels)
    assert accuracy.top1[1] > bayes - 0.02
    assert accuracy.top5.tolist() == [1.0, 1.0]


def test_calibration_error_of_known_cases() -> None:
    sure = torch.ones(1000)
    assert probe.calibration_error(sure, sure).item() == pytest.approx(0)
    assert probe.calibration_error(sure, (torch.arange(1000) % 2).float()).item() == pytest.approx(0.5)
    confidence = torch.linspace(0.1, 1, 20_000)
    correct = (torch.rand(20_000, generator=torch.Generator().manual_seed(0)) < confidence).float()
    assert probe.calibration_error(confidence, correct).item() < 0.02


def test_held_out_part_is_stratified_and_apart() -> None:
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 3)
    kept, held = probe.split(labels, 0.1)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(153))
    assert labels[held].bincount().tolist() == [10, 5, 1]


def test_knn_equals_scikit_learn() -> None:
    train, labels = clouds()
    test, answers = clouds(200, seed=1)
    found = knn_accuracy(train, labels, test, answers, neighbours=(1, 10, 50), temperature=0.07)
    for k in (1, 10, 50):
        classifier = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
        ).fit(train.numpy(), labels.numpy())
        assert found[k]["top1"] == pytest.approx(classifier.score(test.numpy(), answers.numpy()), abs=0.011)
        assert found[k]["top5"] == 1.0
    assert knn_accuracy(train[:5], labels[:5], test, answers, neighbours=(20,))[20]["top1"] > 0
    assert knn_accuracy(train, labels, test, answers, neighbours=()) == {}


def test_knn_of_a_low_temperature_trusts_the_nearest_one() -> None:
    generator = torch.Generator().manual_seed(0)
    train, labels = torch.randn(200, 12, generator=generator), torch.randint(0, 4, (200,), generator=generator)
    found = knn_accuracy(train, labels, train, labels, neighbours=(1, 20), temperature=1e-4)
    assert found[1]["top1"] == found[20]["top1"] == 1.0  # each is its own nearest neighbour


def test_a_few_neighbours_are_not_searched_on_a_gpu_that_may_be_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(*arguments: object) -> None:
        raise AssertionError("memory of the GPU")

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "StandardGpuResources", taken, raising=False)
    train, labels = clouds()
    assert knn_accuracy(train, labels, train, labels, neighbours=(1,))[1]["top1"] == 1.0
