"""The table of kernels: candidates, forcing, recording and taking up again."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import pretrain  # noqa: F401  (registers the models)
from configs.errors import UserError
from configs.schema import Compute
from pretrain import kernels
from pretrain.models.connectivity import AttentionCoupling
from pretrain.models.kernels import build
from pretrain.models.kuramoto import Readout

CPU = torch.device("cpu")
needs_native = pytest.mark.skipif(build.library().handle is None, reason=build.library().reason or "compiled")


@pytest.fixture
def model() -> nn.Module:
    return timm.create_model("akorn_nano_patch4_32", num_classes=0, num_steps=2)


@needs_native
def test_measured_choice_is_recorded_and_used_again(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = SimpleNamespace(first=True, device=CPU, world_size=1, rank=0)
    state = torch.random.get_rng_state()
    rows = kernels.set_up(model, Compute(precision="fp32", compile=False), ranks, tmp_path, images=8)
    assert torch.equal(state, torch.random.get_rng_state())
    assert set(rows[0]["ms"]) == {"plain", "native"}
    assert [layer.kernel for layer in kernels.layers_of(model)] == [rows[0]["kernel"]]
    assert json.loads((tmp_path / "kernels.json").read_text()) == rows

    rows[0]["kernel"] = "plain"
    (tmp_path / "kernels.json").write_text(json.dumps(rows))
    monkeypatch.setattr(kernels, "measure", None)  # a resume measures nothing
    assert kernels.set_up(model, Compute(precision="fp32", compile=False), ranks, tmp_path, images=8) == rows
    assert [layer.kernel for layer in kernels.layers_of(model)] == ["plain"]


def test_a_record_of_another_precision_is_not_used(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available", lambda *_: (["plain", "native"], ""))
    monkeypatch.setattr(kernels, "measure", lambda layer, name, *_: {"plain": 2.0, "native": 1.0}[name])
    first = kernels.choose(model, Compute(precision="fp32"), CPU)
    first[0]["kernel"] = "plain"
    assert kernels.choose(model, Compute(precision="fp32"), CPU, recorded=first)[0]["kernel"] == "plain"
    assert kernels.choose(model, Compute(precision="bf16"), CPU, recorded=first)[0]["kernel"] == "native"


def test_forced_kernel_measures_nothing(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "measure", None)
    assert kernels.choose(model, Compute(kernel="plain"), CPU)[0]["kernel"] == "plain"


def test_stages_of_the_classifier_are_measured_on_their_own_grids() -> None:
    model = timm.create_model("akorn_classifier_32", embed_dim=8)
    rows = kernels.choose(model, Compute(compile=False, precision="fp32"), CPU)
    assert [row["layer"].partition("tokens ")[2] for row in rows] == ["32x32 T 3", "16x16 T 3", "8x8 T 3"]


def test_forcing_graphs_says_what_they_need(model: nn.Module) -> None:
    with pytest.raises(UserError, match=r"need a GPU.*compute\.kernel=auto"):
        kernels.choose(model, Compute(kernel="graphed"), CPU)


def test_forcing_what_cannot_run_is_a_user_error() -> None:
    conv = timm.create_model("akorn_conv_nano_patch4_32", num_classes=0)
    with pytest.raises(UserError, match=r"compute\.kernel=auto"):
        kernels.choose(conv, Compute(kernel="native"), CPU)


@pytest.mark.parametrize(
    ("changes", "graphed"),
    [({}, True), ({"micro_batch": 8}, False), ({"recompute": True}, False), ({"zero_stage": 1}, False)],
)
def test_graphs_are_offered_where_addresses_stay(model: nn.Module, changes: dict[str, Any], graphed: bool) -> None:
    (layer,) = kernels.layers_of(model)
    names, _ = kernels.available(layer, Compute(**changes), torch.float32, torch.device("cuda"))
    assert names == ["plain", "compiled", *(["graphed"] if graphed else [])]


@pytest.mark.parametrize(("stage", "compiled"), [(0, True), (2, True), (3, False)])
def test_readouts_are_compiled_where_deepspeed_has_no_hooks_in_them(
    model: nn.Module, stage: int, compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_name", lambda device: "a GPU")
    monkeypatch.setattr(kernels, "find_compiler", lambda: "c++")
    ranks = SimpleNamespace(first=True, device=torch.device("cuda"), world_size=1, rank=0)
    kernels.set_up(model, Compute(zero_stage=stage, kernel="plain"), ranks, tmp_path, images=8)
    readouts = [module for module in model.modules() if isinstance(module, Readout)]
    assert [module._compiled_call_impl is not None for module in readouts] == [compiled] * len(readouts)


@pytest.mark.parametrize("name", ["akorn_nano_patch4_32", "itrsa_nano_patch4_32", "vit_tiny_patch16_224"])
def test_what_is_to_be_compiled_is_called_as_a_module(name: str) -> None:
    """nn.Module.compile compiles the call of a module and none of its other methods."""
    model = timm.create_model(name, num_classes=0, img_size=32)
    wanted, called = kernels._compilable(model), []
    for module in wanted:
        module.register_forward_hook(lambda module, *_: called.append(module))
    model(torch.zeros(1, 3, 32, 32))
    assert called == wanted != []


def test_every_block_of_a_deep_model_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own rate of stochastic depth: torch compiles anew for it, by default eight times."""
    real, compiled = torch.compile, []

    def counted(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda *args, **options: real(*args, **options, backend=counted))
    monkeypatch.setattr(kernels, "_name", lambda device: "a GPU")
    monkeypatch.setattr(kernels, "find_compiler", lambda: "c++")
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, drop_path_rate=0.1)
    ranks = SimpleNamespace(first=True, device=torch.device("cuda"), world_size=1, rank=0)
    kernels.set_up(model, Compute(), ranks, tmp_path, images=8)
    model(torch.zeros(1, 3, 32, 32))
    assert len(compiled) == 12


def test_no_compiler_leaves_the_plain_kernel_and_one_line(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AKORN_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    build.library.cache_clear()
    try:
        (row,) = kernels.choose(model, Compute(precision="fp32"), CPU)
    finally:
        build.library.cache_clear()
    assert row["kernel"] == "plain"
    assert len(row["note"].splitlines()) == 1


@needs_native
def test_features_by_the_native_kernel_equal_the_plain_ones(model: nn.Module) -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model.eval()
    with torch.no_grad():
        plain = model(images)
        kernels.fastest(model)
        native = model(images)
    torch.testing.assert_close(native, plain, rtol=0, atol=1e-5 * plain.abs().max().item())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kernel", ["plain", "native"])
@pytest.mark.parametrize("coupling", ["attn", "conv"])
def test_layers_run_on_fake_cuda_tensors(coupling: str, kernel: str, recompute: bool) -> None:
    """No tensor is left on the CPU and no value is asked for (a device sync). Autograd takes no fake device."""
    with FakeTensorMode(allow_non_fake_inputs=False), torch.device("cuda"):
        arguments = {"coupling": coupling, "omega": "pair", "learn_gamma": True, "num_steps": 2}
        model = timm.create_model("akorn_nano_patch4_32", num_classes=0, **arguments)
        (block,) = model.blocks
        block.kuramoto.kernel = block.readout.kernel = kernel
        block.kuramoto.grad_checkpointing = recompute
        x, c = (torch.randn(2, 64, 128, requires_grad=True) for _ in range(2))
        y = block.readout(block.kuramoto(x, c, (8, 8), gamma=model.gamma))
        assert (y.device.type, y.requires_grad) == ("cuda", True)


@needs_native
@pytest.mark.parametrize("name", ["itrsa_nano_patch4_32", "akorn_nano_patch4_32"])
def test_attention_outside_of_native_layers_is_native_too(name: str) -> None:
    ablation = {"norm": "clamp"} if name.startswith("akorn") else {}
    model = timm.create_model(name, num_classes=0, num_steps=2, **ablation)
    rows = kernels.choose(model, Compute(kernel="native", precision="fp32"), CPU)
    assert [row["kernel"] for row in rows] == ["native"]
    kernels.apply(model, rows)
    assert [m.kernel for m in model.modules() if isinstance(m, AttentionCoupling)] == ["native"]


@needs_native
def test_readouts_go_with_their_layers(model: nn.Module) -> None:
    kernels.apply(model, kernels.choose(model, Compute(kernel="native", precision="fp32"), CPU))
    assert [block.readout.kernel for block in model.blocks] == ["native"]
    kernels.apply(model, kernels.choose(model, Compute(kernel="plain"), CPU))
    assert [block.readout.kernel for block in model.blocks] == ["plain"]


@needs_native
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_native_readout_equal_the_plain_ones(dtype: torch.dtype, recompute: bool) -> None:
    """Whether its linear map is kept or computed again; 49 tokens are padded."""
    torch.manual_seed(0)
    readout, x = Readout(64, 4, 32), torch.randn(3, 49, 64, requires_grad=True)
    readout.init_weights()
    readout.grad_checkpointing = recompute
    grad = torch.randn(3, 49, 32)

    def run(kernel: str, precision: torch.dtype) -> list[torch.Tensor]:
        readout.kernel = kernel
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            out = readout(x)
        return [out, *torch.autograd.grad(out, [x, *readout.parameters()], grad)]

    for ours, plain in zip(run("native", dtype), run("plain", torch.float32), strict=True):
        error = 1e-6 if dtype == torch.float32 else 1e-2
        assert torch.linalg.vector_norm(ours - plain) < error * torch.linalg.vector_norm(plain)
