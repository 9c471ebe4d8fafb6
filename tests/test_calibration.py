"""ECE and its relatives against values computed by hand and naive loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from downstream import calibration


def two_class(confidence: float) -> list[float]:
    return [confidence, 1 - confidence]


def test_ece_by_hand() -> None:
    # Bins of width 1/5. Confidences .9 .9 .95 (bin 5: 2 of 3 right), .7 .7 (bin 4: 1 of 2 right).
    probabilities = [two_class(c) for c in (0.9, 0.9, 0.95, 0.7, 0.7)]
    labels = [0, 0, 1, 0, 1]
    bins = calibration.reliability(probabilities, labels, bins=5)
    assert bins.counts.tolist() == [0, 0, 0, 2, 3]
    gap_5, gap_4 = abs(2 / 3 - 2.75 / 3), abs(0.5 - 0.7)
    assert bins.ece == pytest.approx((3 * gap_5 + 2 * gap_4) / 5)
    assert bins.overconfidence == pytest.approx((3 * gap_5 + 2 * gap_4) / 5)
    assert np.isnan(bins.accuracy[0])


def test_edges_belong_to_the_lower_bin() -> None:
    bins = calibration.reliability([two_class(0.6), two_class(0.8), two_class(1.0)], [0, 0, 0], bins=5)
    assert bins.counts.tolist() == [0, 0, 1, 1, 1]


def test_ece_against_a_naive_loop() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(10) * 0.3, size=500)
    labels = rng.integers(0, 10, size=500)
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = [(p.max(), p.argmax() == y) for p, y in zip(probabilities, labels) if low < p.max() <= low + 1 / 15]
        if inside:
            confidence, right = np.mean(inside, axis=0)
            expected += len(inside) / 500 * abs(confidence - right)
    assert calibration.reliability(probabilities, labels).ece == pytest.approx(expected)


def test_a_calibrated_classifier_has_small_ece_and_a_sharpened_one_not() -> None:
    rng = np.random.default_rng(1)
    probabilities = rng.dirichlet(np.ones(10) * 0.5, size=20_000)
    labels = (probabilities.cumsum(axis=1) > rng.random((20_000, 1))).argmax(axis=1)
    assert calibration.reliability(probabilities, labels).ece < 0.015
    sharp = probabilities**3 / (probabilities**3).sum(axis=1, keepdims=True)
    bins = calibration.reliability(sharp, labels)
    assert bins.ece > 0.1
    assert bins.overconfidence == pytest.approx(bins.ece, abs=0.01)


def test_brier_and_likelihood_by_hand() -> None:
    probabilities, labels = [[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], [0, 1]
    assert calibration.brier(probabilities, labels) == pytest.approx((0.25 + 2 * 0.0625 + 0.01 + 0.81 + 0.64) / 2)
    assert calibration.negative_log_likelihood(probabilities, labels) == pytest.approx(-np.log([0.5, 0.1]).mean())


def test_averaging_over_starts() -> None:
    rng = np.random.default_rng(2)
    draws, labels = rng.dirichlet(np.ones(4), size=(3, 50)), rng.integers(0, 4, size=50)
    found = calibration.summary(draws, labels)
    assert found["ece"] == pytest.approx(np.mean([calibration.reliability(one, labels).ece for one in draws]))
    assert found["ece_averaged"] == pytest.approx(calibration.reliability(draws.mean(0), labels).ece)
    assert found["accuracy_averaged"] == (draws.mean(0).argmax(1) == labels).mean()


def test_diagram_is_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    curve = calibration.reliability(rng.dirichlet(np.ones(4), size=50), rng.integers(0, 4, size=50))
    calibration.draw(tmp_path / "reliability.png", {"clean": curve, "corrupted": curve})
    assert (tmp_path / "reliability.png").stat().st_size > 5000
