"""ItrSA: its iteration, its variants, and its likeness to AKOrN."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from pretrain.models.itrsa import ItrSA, ItrSABlock
from pretrain.models.registry import MODELS


def test_block_is_attention_repeated_then_an_mlp() -> None:
    torch.manual_seed(0)
    block = ItrSABlock(16, 2, 24, grid=None, num_steps=3)
    x = torch.randn(2, 6, 16)
    reference = nn.MultiheadAttention(16, 2, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(block.attn.qkv.weight)
        reference.in_proj_bias.copy_(block.attn.qkv.bias)
        reference.out_proj.load_state_dict(block.attn.out.state_dict())
    expected = x
    for _ in range(3):
        normed = nn.functional.layer_norm(expected, (16,))
        expected = expected + reference(normed, normed, normed, need_weights=False)[0]
    expected = expected + block.mlp(nn.functional.layer_norm(expected, (16,)))
    torch.testing.assert_close(block(x, (2, 3)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", [{"positions": "abs"}, {"positions": "none"}, {"norm_layer": "rmsnorm"}, {}])
def test_variants_train_every_parameter(variant: dict[str, str]) -> None:
    model = ItrSA(16, 4, num_classes=3, embed_dim=32, num_heads=4, num_steps=[2, 1], **variant)  # type: ignore[arg-type]
    model(torch.randn(2, 3, 20, 12)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_every_attention_akorn_has_a_twin_of_nearly_equal_size() -> None:
    names = [name for name in MODELS if name.startswith("akorn_") and "conv" not in name and "classifier" not in name]
    for name in names:
        with torch.device("meta"):
            akorn = timm.create_model(name, num_classes=0)
            itrsa = timm.create_model(name.replace("akorn", "itrsa", 1), num_classes=0)
        counts = [sum(p.numel() for p in model.parameters()) for model in (akorn, itrsa)]
        assert abs(counts[0] - counts[1]) / counts[0] < 0.01, (name, counts)


def test_more_steps_and_recomputation() -> None:
    model = ItrSA(16, 4, num_classes=0, embed_dim=32, num_heads=4, depth=1, num_steps=4).eval()
    images = torch.randn(2, 3, 16, 16)
    before = model(images)
    model.set_grad_checkpointing()
    assert torch.equal(model(images), before)
    model.set_steps(9)
    assert not torch.allclose(model(images), before)


def test_a_start_is_refused() -> None:
    with pytest.raises(ValueError, match="no oscillators"):
        ItrSA(16, 4, embed_dim=32, num_heads=4)(torch.randn(1, 3, 16, 16), torch.randn(1, 16, 32))
    with pytest.raises(ValueError, match="layernorm or rmsnorm"):
        ItrSA(16, 4, embed_dim=32, num_heads=4, norm_layer="batchnorm")
