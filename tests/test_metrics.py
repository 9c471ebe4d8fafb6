"""Segmentation scores against scikit-learn, naive loops and the published values."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from sklearn.metrics import adjusted_rand_score

from downstream import metrics

SHARED = Path(os.environ.get("AKORN_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def random_maps(seed: int, objects: int = 4, segments: int = 5, size: int = 12) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    truth = generator.integers(-1, objects + 1, (size, size))
    return truth, generator.integers(0, segments, (size, size))


def naive_mbo(truth: np.ndarray, prediction: np.ndarray) -> float:
    best = []
    for label in set(truth[truth > 0].tolist()):
        scores = []
        for segment in set(prediction.flatten().tolist()):
            inside = (prediction == segment) & (truth != -1)
            scores.append((inside & (truth == label)).sum() / (inside | (truth == label)).sum())
        best.append(max(scores))
    return float(np.mean(best)) if best else float("nan")


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), objects=st.integers(0, 5), segments=st.integers(1, 6))
def test_scores_equal_scikit_learn_and_naive_loops(seed: int, objects: int, segments: int) -> None:
    truth, prediction = random_maps(seed, objects, segments)
    scores = metrics.score(torch.from_numpy(truth)[None], torch.from_numpy(prediction)[None])
    foreground, valid = truth > 0, truth != -1
    if foreground.any():
        assert scores["fg_ari"].item() == pytest.approx(adjusted_rand_score(truth[foreground], prediction[foreground]))
        assert scores["ari"].item() == pytest.approx(adjusted_rand_score(truth[valid], prediction[valid]))
    else:
        assert np.isnan([scores["fg_ari"].item(), scores["ari"].item()]).all()
    assert scores["mbo_i"].item() == pytest.approx(naive_mbo(truth, prediction), nan_ok=True)
    two = len(set(truth[foreground].tolist())) >= 2
    assert np.isnan(scores["fg_ari_2"].item()) != two


def test_batch_equals_single_images() -> None:
    pairs = [random_maps(seed) for seed in range(5)]
    truth, prediction = (torch.from_numpy(np.stack(maps)) for maps in zip(*pairs))
    together = metrics.score(truth, prediction, classes=truth.clamp(-1, 1))
    for position in range(5):
        alone = metrics.score(truth[position : position + 1], prediction[position : position + 1])
        for name, value in alone.items():
            assert together[name][position].item() == pytest.approx(value.item(), nan_ok=True)


def test_hungarian_gives_each_segment_to_one_object() -> None:
    truth = torch.tensor([[[1, 1, 2, 2]]])
    assert metrics.score(truth, torch.zeros_like(truth))["miou"].item() == pytest.approx(0.25)  # 0.5 and none
    assert metrics.score(truth, truth)["miou"].item() == 1.0


def test_images_without_objects_have_no_score() -> None:
    truth = torch.zeros(3, 4, 4, dtype=torch.long)
    truth[0, 0, 0] = 1
    scores = metrics.score(truth, torch.zeros_like(truth))
    assert scores["fg_ari"].tolist() == pytest.approx([1.0, math.nan, math.nan], nan_ok=True)
    assert scores["mbo_i"].tolist() == pytest.approx([1 / 16, math.nan, math.nan], nan_ok=True)
    assert all(value[1:].isnan().all() for value in scores.values())


def test_large_labels_are_renumbered() -> None:
    truth, prediction = (torch.from_numpy(array)[None] for array in random_maps(3))
    large = torch.where(truth > 0, truth * 70_001, truth)
    for name, value in metrics.score(large, prediction * 50_000).items():
        assert value.item() == pytest.approx(metrics.score(truth, prediction)[name].item(), nan_ok=True)


@pytest.mark.parametrize(("grid", "size"), [((3, 4), (12, 12)), ((5, 3), (12, 13))])
def test_segments_of_tokens_score_as_their_enlargement(grid: tuple[int, int], size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(-1, 4, (4, *size), generator=generator)
    tokens = torch.randint(0, 5, (4, *grid), generator=generator)
    large = torch.nn.functional.interpolate(tokens[:, None].float(), size=size)[:, 0].long()
    known = metrics.score(truth, large, truth.clamp(-1, 1))
    for name, value in metrics.score(truth, tokens, truth.clamp(-1, 1)).items():
        torch.testing.assert_close(value, known[name], equal_nan=True)
    counts = metrics.by_token(truth + 1, grid)
    assert counts.sum() == truth.numel()
    assert counts[2, 1].sum() == (truth[2] == 0).sum()


def test_images_of_ignored_pixels_only_have_no_scores() -> None:
    nothing = torch.full((2, 6, 6), -1)
    for prediction in (torch.zeros(2, 6, 6), torch.zeros(2, 3, 3)):
        assert all(value.isnan().all() for value in metrics.score(nothing, prediction, nothing).values())


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="must both be"):
        metrics.overlap(torch.zeros(1, 2, 2), torch.zeros(1, 3, 3))
    with pytest.raises(ValueError, match="start at -1"):
        metrics.overlap(torch.full((1, 2, 2), -2), torch.zeros(1, 2, 2))


@pytest.mark.skipif(not (SHARED / "golden").is_dir(), reason="the published values are not at hand")
def test_published_values() -> None:
    with safe_open(SHARED / "golden" / "object_metrics.safetensors", "pt") as file:
        assert json.loads(file.metadata()["config"])["kind"] == "metrics"
        scores = metrics.score(file.get_tensor("ground_truth"), file.get_tensor("prediction"))
        published = file.get_tensor("mbo")
        torch.testing.assert_close(scores["fg_ari"], file.get_tensor("fg_ari"), rtol=0, atol=1e-12)
        torch.testing.assert_close(scores["mbo_i"].nan_to_num(-1.0), published, rtol=0, atol=1e-10)
