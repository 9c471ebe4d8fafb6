"""Grouping of feature maps: recovers what is there, by every method; sizes, sweeps and errors."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from sklearn.cluster import SpectralClustering
from sklearn.metrics import adjusted_rand_score

from downstream import kmeans
from downstream.grouping import Grouping, Method, enlarge, group, group_sweep
from downstream.spectral import spectral
from downstream.tiling import interleave, shifted_crops

SHARED = Path(os.environ.get("AKORN_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def quadrants(images: int = 3, side: int = 8, channels: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps whose four quadrants differ, and the quadrants."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(side) // (side // 2)
    truth = (rows[:, None] * 2 + rows).expand(images, -1, -1)
    centres = torch.randn(images, 4, channels, generator=generator)
    maps = torch.stack([centre[of] for centre, of in zip(centres, truth)]).permute(0, 3, 1, 2)
    return maps + 0.05 * torch.randn(maps.shape, generator=generator), truth


@pytest.mark.parametrize("method", ["linkage", "kmeans", "spectral"])
def test_every_method_finds_clear_groups(method: Method) -> None:
    maps, truth = quadrants()
    for components in (None, 5):
        segments = group(maps, Grouping(method=method, clusters=4, components=components))
        for one, other in zip(segments, truth):
            assert adjusted_rand_score(one.flatten(), other.flatten()) == 1.0


@pytest.mark.parametrize("method", ["linkage", "kmeans", "spectral"])
def test_more_clusters_than_tokens(method: Method) -> None:
    segments = group(torch.randn(2, 5, 2, 2), Grouping(method=method, clusters=9, components=None))
    assert segments.shape == (2, 2, 2)
    assert int(segments.max()) <= 3


def test_sweep_equals_single_cuts_and_distance_finds_the_number() -> None:
    maps, truth = quadrants()
    sweep = group_sweep(maps, Grouping(), [2, 4, 6])
    for clusters, segments in zip([2, 4, 6], sweep):
        assert torch.equal(segments, group(maps, Grouping(clusters=clusters)))
    by_distance = group(maps, Grouping(distance=0.5))
    assert all(adjusted_rand_score(a.flatten(), b.flatten()) == 1.0 for a, b in zip(by_distance, truth))
    with pytest.raises(ValueError, match="cannot cut by distance"):
        group(maps, Grouping(method="kmeans", distance=0.5))


def test_affinities_of_spectral_clustering_do_not_depend_on_centring() -> None:
    tokens = F.normalize(torch.randn(1, 60, 4, generator=torch.Generator().manual_seed(0)) + 2, dim=-1).double()
    cosines = ((tokens[0] @ tokens[0].T - 1) / 0.2).exp().numpy()
    known = SpectralClustering(3, affinity="precomputed", random_state=0).fit_predict(cosines)
    whole = spectral(tokens, 3)[0]
    assert adjusted_rand_score(whole, known) > 0.9  # scikit-learn normalises the eigenvectors in another way
    centred = tokens - tokens.mean(1, keepdim=True)
    assert adjusted_rand_score(spectral(centred, 3)[0], whole) == 1.0


def test_tokens_that_are_all_alike_are_grouped() -> None:
    maps = torch.randn(120, 129, 1, 1, generator=torch.Generator().manual_seed(1)).expand(-1, -1, 10, 14)
    assert group(maps, Grouping(clusters=4)).shape == (120, 10, 14)


def test_broken_features_are_an_error() -> None:
    with pytest.raises(ValueError, match="not finite"):
        group(torch.full((1, 4, 3, 3), torch.nan), Grouping())


@pytest.mark.parametrize("size", [(16, 16), (20, 13), (8, 8)])
def test_enlarging_is_nearest_interpolation(size: tuple[int, int]) -> None:
    segments = torch.randint(0, 5, (2, 8, 8))
    expected = F.interpolate(segments[:, None].float(), size=size, mode="nearest")[:, 0].long()
    assert torch.equal(enlarge(segments, size), expected)


def test_kmeans_is_seeded_and_independent_of_the_batch() -> None:
    features = torch.randn(4, 50, 6)
    together = kmeans.kmeans(features, 5, seed=3)
    assert torch.equal(together[2:3], kmeans.kmeans(features[2:3], 5, seed=3))


def test_interleaved_features_lie_where_their_pixels_are() -> None:
    images = torch.arange(16.0).view(1, 1, 1, 16) + 100 * torch.arange(16.0).view(1, 1, 16, 1)
    crops = shifted_crops(images, patch=4, factor=2)
    fine = interleave(torch.stack([F.avg_pool2d(crop, 4) for crop in crops]), factor=2)
    assert fine.shape == (1, 1, 8, 8)
    assert (fine[0, 0].diff(dim=0) > 0).all()
    assert (fine[0, 0].diff(dim=1) > 0).all()
    with pytest.raises(ValueError, match="divides"):
        shifted_crops(images, patch=4, factor=3)


@pytest.mark.skipif(not (SHARED / "golden").is_dir(), reason="the published values are not at hand")
def test_published_crops() -> None:
    with safe_open(SHARED / "golden" / "up_tiling.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        crops = shifted_crops(file.get_tensor("image"), patch=config["patch_size"], factor=config["factor"])
        torch.testing.assert_close(crops, file.get_tensor("shifted"), rtol=0, atol=1e-5)
