"""The classifier: shapes of its pyramid, starts, mixed couplings."""

from __future__ import annotations

import pytest
import timm
import torch

from pretrain.models.classifier import KuramotoClassifier


def network(**kwargs: object) -> KuramotoClassifier:
    torch.manual_seed(0)
    return KuramotoClassifier(**{"embed_dim": 8, "num_steps": 2, **kwargs})  # type: ignore[arg-type]


def test_pyramid() -> None:
    model = network().eval()
    seen = model.forward_oscillators(torch.randn(2, 3, 32, 32), energy=True)
    assert seen.grids == [(32, 32), (16, 16), (8, 8)]
    assert [tuple(r.shape) for r in seen.readout] == [(2, 8, 32, 32), (2, 16, 16, 16), (2, 32, 8, 8)]
    assert [e.shape for e in seen.energy] == [(3, 2)] * 3
    assert model.start_shape() == (1024, 8)


def test_evaluation_does_not_depend_on_the_batch() -> None:
    model, images = network().eval(), torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(model(images)[1:2], model(images[1:2]), rtol=1e-4, atol=1e-5)
    start = torch.randn(1, 4, 2, 32, 32)
    assert not torch.allclose(model(images, start), model(images))


@pytest.mark.parametrize("variant", [{"coupling": ("conv", "conv", "attn"), "num_heads": 4}, {"batch_norm": False},
                                     {"omega": "pair", "n": 4, "readout_n": 4}, {"learn_gamma": False},
                                     {"coupling": "none"}, {}])  # fmt: skip
def test_variants_train_every_parameter(variant: dict[str, object]) -> None:
    model = network(**variant).train()
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_published_width() -> None:
    with torch.device("meta"):
        model = timm.create_model("akorn_classifier_32")
    assert model.num_features == 256
    assert [block.kuramoto.coupling.conv.weight.shape for block in model.blocks] == [
        (64, 64, 9, 9), (128, 128, 7, 7), (256, 256, 5, 5),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no patches"):
        model.set_input_size(patch_size=4)
