"""AKOrN backbones: starts, steps, variants and controls, initialisation, precision, devices."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pretrain.models.akorn import AKOrN
from pretrain.models.classifier import KuramotoClassifier
from pretrain.models.oscillators import oscillators_of, state_of
from pretrain.models.registry import MODELS
from pretrain.models.sudoku import SudokuNet

SMALL: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_steps": 3,
                         "num_classes": 0}  # fmt: skip


def network(**kwargs: Any) -> AKOrN:
    torch.manual_seed(0)
    return AKOrN(**{**SMALL, **kwargs})


def test_evaluation_does_not_depend_on_the_batch() -> None:
    model, images = network().eval(), torch.randn(3, 3, 16, 16)
    together = model(images)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert torch.equal(together, model(images))


def test_permuting_the_batch_permutes_the_outputs() -> None:
    model, images, start = network().eval(), torch.randn(4, 3, 16, 16), torch.randn(4, 16, 32)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(model(images[order], start[order]), model(images, start)[order])


def test_starts_are_seeded_and_shared_between_models() -> None:
    images = torch.randn(1, 3, 16, 16)
    model, other = network(start_seed=3).eval(), network().eval()
    assert not torch.equal(model(images), other(images))
    other.set_start_seed(3)
    assert torch.equal(model(images), other(images))
    assert torch.equal(model(images), model(images, model.draw_start(3)))
    assert model.start_shape() == (16, 32)
    assert model.start_shape((24, 32)) == (48, 32)
    assert "start" not in model.state_dict()


def test_training_draws_a_new_start_each_time_from_torchs_generator() -> None:
    model, images = network().train(), torch.randn(2, 3, 16, 16)
    torch.manual_seed(5)
    first, second = model(images), model(images)
    torch.manual_seed(5)
    assert torch.equal(first, model(images))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("size", [(16, 16), (24, 20)])
def test_published_starts_equal_token_starts(size: tuple[int, int]) -> None:
    model, images = network(n=2).eval(), torch.randn(2, 3, *size)
    grid = (size[0] // 4, size[1] // 4)
    start = torch.randn(2, 16, 2, *grid)
    tokens = state_of(start, 2)
    assert torch.equal(oscillators_of(tokens, 2, grid), start)
    assert torch.equal(model(images, start), model(images, tokens))


def test_wrong_starts_are_refused() -> None:
    model, images = network().eval(), torch.randn(2, 3, 16, 16)
    for start in (torch.randn(3, 16, 32), torch.randn(2, 16, 16), torch.randn(2, 8, 2, 4, 4)):
        with pytest.raises(ValueError, match="does not fit"):
            model(images, start)


def test_steps_can_be_changed_and_trajectories_are_those_steps() -> None:
    model, images = network().eval(), torch.randn(2, 3, 16, 16)
    seen = model.forward_oscillators(images, steps=7, trajectory=True, energy=True)
    assert [t.shape for t in seen.trajectory] == [(8, 2, 16, 32)] * 2
    assert [e.shape for e in seen.energy] == [(8, 2)] * 2
    assert torch.equal(seen.trajectory[1][-1], seen.oscillators[1])
    assert seen.energy[0][0].abs().max() == 0
    model.set_steps(7)
    assert torch.equal(model.forward_features(images), seen.readout[-1])
    model.set_steps([7, 2])
    assert [block.kuramoto.num_steps for block in model.blocks] == [7, 2]
    quiet = model.forward_oscillators(images)
    assert quiet.energy == quiet.trajectory == quiet.lyapunov == []


VARIANTS: dict[str, dict[str, Any]] = {
    "n2": {"n": 2},
    "n8": {"n": 8, "embed_dim": 64},
    "mixed": {"coupling": ["conv", "attn"], "kernel_size": [5, 1], "num_steps": [1, 4]},
    "no_coupling": {"coupling": "none"},
    "no_projection": {"projection": False},
    "clamp": {"norm": "clamp", "projection": False},
    "rms": {"norm": "rms"},
    "unnormalised": {"norm": "none", "gamma": 0.1},
    "omega_pair": {"omega": "pair"},
    "omega_global_fixed": {"omega": "global", "learn_omega": False, "omega_init": 0.3},
    "sandb": {"c_norm": "sandb"},
    "no_c_norm": {"c_norm": "none"},
    "carry": {"carry": "linear"},
    "learned_gamma": {"learn_gamma": True},
    "absolute": {"positions": "abs"},
    "no_positions": {"positions": "none"},
    "average": {"global_pool": "avg"},
    "rescaled_input": {"rescale_input": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_differ_from_the_default_and_train_every_parameter(variant: str) -> None:
    model, default = network(**VARIANTS[variant]).train(), network().train()
    images, start = torch.randn(2, 3, 20, 16), torch.randn(2, *model.start_shape((20, 16)))
    pooled = model(images, start)
    pooled.square().sum().backward()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    if variant not in ("n8", "rescaled_input", "learned_gamma"):  # other widths and grids; the same until it learns
        assert not torch.allclose(pooled, default(images, start))


def test_without_coupling_tokens_do_not_talk() -> None:
    """With J = 0 and no normalisation of c, a changed patch changes its own token only."""
    model = network(coupling="none", c_norm="none").eval()
    images = torch.randn(1, 3, 16, 16)
    changed = images.clone()
    changed[:, :, :4, :4] += 1
    difference = (model.forward_features(changed) - model.forward_features(images)).abs().amax((0, 1))
    assert difference[0, 0] > 0
    assert difference.flatten()[1:].max() < 1e-6


def test_rescaled_input_is_a_resized_image() -> None:
    model, images = network(rescale_input=True).eval(), torch.randn(2, 3, 24, 40)
    resized = torch.nn.functional.interpolate(images, size=(16, 16), mode="bilinear")
    assert torch.equal(model(images), model(resized))
    assert model.start_shape((24, 40)) == (16, 32)


def test_sizes_that_are_no_multiple_of_the_patch_lose_the_remainder() -> None:
    model, images = network().eval(), torch.randn(1, 3, 19, 18)
    assert torch.equal(model(images), model(images[..., :16, :16]))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if "base" in name or "large" in name else []) for name in MODELS],
)
def test_every_parameter_is_initialised(name: str) -> None:
    with torch.device("cpu"):
        model = timm.create_model(name)
    for key, value in [*model.named_parameters(), *model.named_buffers()]:
        assert value.isfinite().all(), key
    scale = {
        key: float(value.detach().std())
        for key, value in model.named_parameters()
        if value.ndim >= 2 and "pos" not in key
    }
    assert all(1e-3 < std < 2 for std in scale.values()), scale


def test_a_forgotten_parameter_shows_as_nan() -> None:
    class Forgetful(AKOrN):
        def init_weights(self) -> None:
            """Leaves gamma unset."""

    model = Forgetful(**{**SMALL, "learn_gamma": True})
    assert model(torch.randn(1, 3, 16, 16)).isnan().any()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("steps", [8, 64])
@pytest.mark.parametrize("kind", ["attn", "conv"])
def test_activations_and_gradients_are_of_sane_scale_at_the_start(kind: str, steps: int, precision: str) -> None:
    model = network(num_steps=steps, embed_dim=64, coupling=kind).train()
    images = torch.randn(4, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        seen = model.forward_oscillators(images)
        maps = seen.readout[-1]
    assert seen.oscillators[-1].dtype == torch.float32
    norms = seen.oscillators[-1].unflatten(-1, (4, -1)).norm(dim=-2)
    assert (norms - 1).abs().max() < 1e-5
    assert maps.isfinite().all()
    assert 0.05 < maps.std() < 5
    maps.float().mean((2, 3)).square().mean().sqrt().backward()
    gradients = {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None}
    assert all(math.isfinite(norm) and norm < 100 for norm in gradients.values()), gradients
    assert sum(norm > 1e-8 for norm in gradients.values()) > 0.8 * len(gradients)


WIDE = [name for name in MODELS if name.startswith("akorn") and "classifier" not in name]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name", [name if "nano_patch4_32" in name else pytest.param(name, marks=pytest.mark.slow) for name in WIDE]
)
def test_every_size_starts_sanely_with_64_steps(name: str, precision: str) -> None:
    """On a grid of 4 x 4 tokens, at full width and depth."""
    torch.manual_seed(0)
    side = 4 * MODELS[name][1]["patch_size"]
    model = timm.create_model(name, img_size=side, num_steps=64, num_classes=0).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        maps = model.forward_features(torch.randn(2, 3, side, side))
    assert 0.05 < maps.std() < 5
    maps.mean((2, 3)).square().mean().sqrt().backward()
    norms = {key: float(value.grad.norm()) for key, value in model.named_parameters()}
    assert all(math.isfinite(norm) and norm < 100 for norm in norms.values()), norms


def test_a_half_precision_model_runs() -> None:
    model = network(carry="linear").eval().to(torch.bfloat16)
    assert model(torch.randn(2, 3, 16, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


FAKE = [
    *((name, False) for name in ("akorn_nano_patch4_32", "akorn_conv_nano_patch4_32", "itrsa_nano_patch4_32")),
    ("akorn_nano_patch4_32", True),
    ("akorn_classifier_mixed_32", True),
]


@pytest.mark.parametrize(("name", "training"), FAKE)
def test_runs_on_fake_cuda_tensors(name: str, training: bool) -> None:
    """No tensor is left on the CPU and nothing is read back from the device."""
    with FakeTensorMode(allow_non_fake_inputs=False):
        with torch.device("cuda"):
            model = timm.create_model(name, num_classes=0, num_steps=2).train(training)
        for module in model.modules():  # Module.to cannot swap fake parameters
            module._buffers.update({key: value.to("cuda") for key, value in module._buffers.items()})
        images = torch.randn(2, 3, 32, 32, device="cuda")
        assert model(images).device.type == "cuda"
        if hasattr(model, "forward_oscillators"):
            start = torch.randn(2, *model.start_shape(), device="cuda")
            seen = model.forward_oscillators(images, start, energy=True)
            assert seen.energy[0].device.type == "cuda"
            assert model(torch.randn(2, 3, 40, 32, device="cuda")).device.type == "cuda"


@pytest.mark.parametrize("kind", [KuramotoClassifier, SudokuNet])
def test_a_misspelt_omega_is_none_of_the_kinds(kind: Any) -> None:
    with pytest.raises(ValueError, match="omega 'globel' is unknown: one of none, pair, global"):
        kind(embed_dim=16, omega="globel")


def test_wrong_arguments_name_the_choices() -> None:
    for argument in ({"positions": "rope"}, {"omega": "yes"}, {"carry": "mlp"}, {"global_pool": "token"}):
        with pytest.raises(ValueError, match="unknown"):
            network(**argument)
    with pytest.raises(ValueError, match="one for all, or one per"):
        network(num_steps=[1, 2, 3])
    with pytest.raises(ValueError, match="smaller than patch_size"):
        network(img_size=3)


@pytest.mark.parametrize("steps", [-1, 2.5, [3, -2]])
def test_steps_are_whole_numbers(steps: Any) -> None:
    with pytest.raises(ValueError, match="whole number"):
        network(num_steps=steps)
    with pytest.raises(ValueError, match="whole number"):
        network().set_steps(steps)
