"""Average linkage against fastcluster, SciPy and the published labels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import fastcluster
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from scipy.cluster.hierarchy import fcluster
from sklearn.metrics import adjusted_rand_score

from downstream import native
from downstream.linkage import average_linkage
from downstream.pca import pca
from pretrain.native import NoLibraryError

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("AKORN_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def structured(images: int, tokens: int, channels: int, seed: int = 0, noise: float = 0.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(images, 5, channels, generator=generator)
    of = torch.randint(0, 5, (images, tokens), generator=generator)
    features = torch.gather(centres, 1, of[..., None].expand(-1, -1, channels))
    return features + noise * torch.randn(features.shape, generator=generator)


@pytest.mark.parametrize(
    ("images", "tokens", "channels"), [(5, 64, 16), (3, 256, 32), (2, 700, 8), (4, 2, 3), (2, 65, 1)]
)
def test_dendrogram_and_labels_equal_fastcluster(images: int, tokens: int, channels: int) -> None:
    features = structured(images, tokens, channels)
    tree = average_linkage(features)
    for image in range(images):
        expected = fastcluster.linkage(features[image].double().numpy(), "average")
        np.testing.assert_allclose(tree.heights[image].numpy(), expected[:, 2], rtol=1e-6)
        for clusters in (1, 2, 4, 11):
            if clusters <= tokens:
                labels = tree.cut(clusters)[image].numpy()
                assert len(set(labels.tolist())) == clusters
                assert adjusted_rand_score(labels, fcluster(expected, clusters, "maxclust")) == 1.0
        distance = float(np.median(expected[:, 2])) * 1.0001
        assert adjusted_rand_score(tree.cut_at(distance)[image].numpy(), fcluster(expected, distance, "distance")) == 1


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), tokens=st.integers(2, 150), noise=st.floats(0.01, 3))
def test_random_dendrograms_equal_fastcluster(seed: int, tokens: int, noise: float) -> None:
    features = structured(1, tokens, 6, seed, noise)
    expected = fastcluster.linkage(features[0].double().numpy(), "average")
    np.testing.assert_allclose(average_linkage(features).heights[0].numpy(), expected[:, 2], rtol=1e-6, atol=1e-8)


@pytest.mark.skipif(not (SHARED / "golden").is_dir(), reason="the published values are not at hand")
def test_published_labels() -> None:
    with safe_open(SHARED / "golden" / "agglomerative.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        features, published = file.get_tensor("features"), file.get_tensor("labels").flatten()
    tokens = features.flatten(2).mT
    labels = average_linkage(pca(tokens, config["pca_components"])).cut(config["clusters"])[0]
    assert adjusted_rand_score(labels.numpy(), published.numpy()) == 1.0


def test_threads_change_nothing() -> None:
    features = structured(7, 90, 12)
    once = average_linkage(features, threads=1)
    parts = average_linkage(features, threads=3)
    assert torch.equal(once.children, parts.children)
    torch.testing.assert_close(once.heights, parts.heights)


def test_equal_tokens_and_small_images() -> None:
    equal = torch.ones(2, 30, 4)
    assert average_linkage(equal).heights.abs().max() == 0
    assert average_linkage(equal).cut(4).amax(1).tolist() == [3, 3]
    assert average_linkage(torch.randn(2, 3, 4)).cut(10).sort(1).values.tolist() == [[0, 1, 2]] * 2
    assert average_linkage(torch.randn(3, 1, 4)).cut(4).tolist() == [[0]] * 3


def test_result_does_not_depend_on_what_memory_held_before() -> None:
    """Fresh memory is filled with a pattern (glibc's MALLOC_PERTURB_): some columns once were left unwritten."""
    code = (
        "import torch, fastcluster, numpy as np\n"
        "from downstream.linkage import average_linkage\n"
        "generator = torch.Generator().manual_seed(0)\n"
        "for tokens in [2, 9, 30, 63, 64, 65, 66, 90, 130, 200, 300] * 3:\n"
        "    features = torch.randn(1, tokens, 5, generator=generator)\n"
        "    expected = fastcluster.linkage(features[0].double().numpy(), 'average')[:, 2]\n"
        "    np.testing.assert_allclose(average_linkage(features).heights[0].numpy(), expected, rtol=1e-6)\n"
    )
    for pattern in ("1", "128"):
        environment = {**os.environ, "MALLOC_PERTURB_": pattern, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)


def test_broken_features_are_named() -> None:
    features = torch.randn(3, 10, 4)
    features[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"images \[1\]"):
        average_linkage(features)


def _no_compiler(*_: object) -> None:
    raise NoLibraryError("no C++ compiler")


def test_without_a_compiler_it_warns_once_and_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = structured(2, 80, 8)
    expected = average_linkage(features).cut(5)
    monkeypatch.setenv("AKORN_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    native.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="no C"):
            labels = average_linkage(features).cut(5)
        average_linkage(features)  # silent
    finally:
        native.library.cache_clear()
    for one, other in zip(labels, expected):
        assert adjusted_rand_score(one.numpy(), other.numpy()) == 1.0
