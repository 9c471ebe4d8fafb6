"""AKOrN backbones: starts, shapes, determinism."""

import timm
import torch

import pretrain  # noqa: F401  (registers the models)


def test_evaluation_uses_one_start_for_the_batch():
    model = timm.create_model("akorn_nano_patch4_32", num_classes=0).eval()
    images = torch.randn(3, 3, 32, 32)
    together = model(images)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert torch.equal(together, model(images))
