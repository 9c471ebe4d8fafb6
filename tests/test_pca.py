"""Principal components and leading eigenvectors against NumPy and scikit-learn; degenerate matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from downstream import eigen, native
from downstream.eigen import leading
from downstream.pca import pca


def features_of(images: int, tokens: int, channels: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    strength = torch.linspace(3, 0.3, channels)
    return torch.randn(images, tokens, channels, generator=generator) * strength + 1


@pytest.mark.parametrize(("tokens", "channels"), [(100, 40), (40, 100), (256, 256)])
def test_pca_spans_what_scikit_learn_spans(tokens: int, channels: int) -> None:
    features = features_of(3, tokens, channels)
    reduced = pca(features, 10)
    assert reduced.shape == (3, tokens, 10)
    for one, image in zip(reduced.double(), features.double()):
        expected = torch.from_numpy(PCA(10, svd_solver="full").fit_transform(image.numpy()))
        torch.testing.assert_close(torch.cdist(one, one), torch.cdist(expected, expected), rtol=1e-3, atol=2e-3)
    assert pca(features, max(tokens, channels)).shape == features.shape


def test_images_reduced_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    import downstream.pca as module

    features = features_of(4, 50, 20)
    whole = pca(features, 5)
    monkeypatch.setattr(module, "_NUMBERS", 1000)
    torch.testing.assert_close(pca(features, 5), whole)


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (2, 1), (33, 33), (130, 20), (200, 128)])
def test_leading_eigenvectors_equal_numpys(rows: int, count: int) -> None:
    features = features_of(3, rows, rows + 20)
    matrices = features @ features.mT
    values, vectors = leading(matrices, count)
    known_values, known = np.linalg.eigh(matrices.double().numpy())
    largest = known_values.max()
    np.testing.assert_allclose(values.numpy(), known_values[:, -count:], atol=1e-6 * largest)
    identity = torch.eye(count).expand(3, -1, -1)
    torch.testing.assert_close(vectors.mT @ vectors, identity, rtol=0, atol=1e-4)
    residual = matrices @ vectors - vectors * values[:, None]
    assert residual.abs().max() < 1e-5 * largest
    projector, expected = vectors @ vectors.mT, known[:, :, -count:] @ known[:, :, -count:].swapaxes(1, 2)
    np.testing.assert_allclose(projector.numpy(), expected, atol=2e-3)


@pytest.mark.parametrize("matrix", [torch.zeros(20, 20), torch.eye(20), torch.ones(20, 20), torch.ones(20, 20).tril()])
def test_equal_eigenvalues_still_have_orthogonal_vectors(matrix: torch.Tensor) -> None:
    matrix = matrix + matrix.mT
    values, vectors = leading(matrix[None], 6)
    torch.testing.assert_close(vectors[0].mT @ vectors[0], torch.eye(6), rtol=0, atol=2e-3)
    torch.testing.assert_close(values[0], torch.linalg.eigvalsh(matrix)[-6:], rtol=1e-5, atol=1e-5)


def test_without_a_compiler_torch_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    features = features_of(2, 40, 60)
    expected = leading(features @ features.mT, 4)
    monkeypatch.setattr(native, "library", lambda name: None)
    values, vectors = eigen.leading(features @ features.mT, 4)
    torch.testing.assert_close(values, expected[0], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(vectors.abs(), expected[1].abs(), rtol=1e-2, atol=1e-3)
