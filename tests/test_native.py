"""The native K-layer against the plain one in double precision: values and every gradient."""

from __future__ import annotations

import copy
import platform
import shutil
import subprocess
from collections.abc import Collection
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from pretrain.models.connectivity import AttentionCoupling, Grid
from pretrain.models.kernels import build, native
from pretrain.models.kuramoto import KuramotoLayer, Omega, Readout
from pretrain.native import FLAGS, find_compiler

# Where it can be compiled and is not, these tests fail: they would hide it otherwise.
_LACKING = build.missing_instructions() or ("" if find_compiler() else "a C++ compiler")
needs_native = pytest.mark.skipif(bool(_LACKING), reason=f"lacks {_LACKING}")


def make_layer(
    dim: int, num_heads: int, n: int, grid: Grid, *, gta: bool = True, omega: str = "none", **kwargs: bool
) -> KuramotoLayer:
    torch.manual_seed(0)
    frequencies = None if omega == "none" else Omega(dim, n, shared=omega == "global", init=1.0, learned=True)
    layer = KuramotoLayer(
        dim, n, AttentionCoupling(dim, num_heads, grid if gta else None), num_steps=3, omega=frequencies, **kwargs
    )
    with torch.no_grad():
        for module in layer.modules():
            if hasattr(module, "init_weights"):
                module.init_weights()
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return layer


def results(layer: KuramotoLayer, grid: Grid, kernel: str, dtype: torch.dtype, *, bf16: bool) -> dict[str, Tensor]:
    """Final state and all gradients of a fixed random functional of it, in double precision."""
    generator = torch.Generator().manual_seed(1)
    shape = (5, grid[0] * grid[1], layer.dim)
    x, c, weight = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    x, c, gamma = x.requires_grad_(), c.requires_grad_(), torch.tensor([0.7], dtype=dtype, requires_grad=True)
    layer = copy.deepcopy(layer).to(dtype)
    layer.kernel = kernel
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = layer(x, c, grid, gamma=gamma)
    (y * weight).sum().backward()
    found = {"y": y, "x": x.grad, "c": c.grad, "gamma": gamma.grad}
    found |= {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {name: tensor.detach().double() for name, tensor in found.items()}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor], *, leave_out: Collection[str] = ()) -> float:
    """Largest deviation of any tensor, relative to the largest entry of that tensor."""
    names = [name for name in expected if name not in leave_out]
    return max(((found[k] - expected[k]).abs().max() / expected[k].abs().max()).item() for k in names)


def coupling_results(
    coupling: AttentionCoupling, grid: Grid, kernel: str, dtype: torch.dtype, *, bf16: bool
) -> dict[str, Tensor]:
    """J x and all gradients of a fixed random functional of it, in double precision."""
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(3, grid[0] * grid[1], coupling.dim, generator=generator).to(dtype) for _ in range(2))
    x, coupling = x.requires_grad_(), copy.deepcopy(coupling).to(dtype)
    coupling.kernel = kernel
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = coupling(x, grid, coupling.positions(grid))
    (y * weight).sum().backward()
    found = {"y": y, "x": x.grad, **{name: parameter.grad for name, parameter in coupling.named_parameters()}}
    return {name: tensor.detach().double() for name, tensor in found.items()}


SCALARS = ("gamma", "omega.vector")  # their gradients are single sums in which large parts of both signs cancel
CASES = {
    "gta": ({"dim": 64, "num_heads": 4, "n": 4}, (4, 4)),
    "wide head": ({"dim": 128, "num_heads": 2, "n": 4}, (4, 8)),
    "two components": ({"dim": 128, "num_heads": 4, "n": 2, "omega": "pair"}, (6, 4)),
    "eight components": ({"dim": 128, "num_heads": 8, "n": 8, "omega": "global", "gta": False}, (4, 4)),
    "tokens not a multiple of 16": ({"dim": 64, "num_heads": 4, "n": 4, "omega": "pair"}, (9, 9)),
    "quirk": ({"dim": 64, "num_heads": 2, "n": 4, "self_drift": True}, (4, 4)),
    "no projection": ({"dim": 64, "num_heads": 2, "n": 4, "projection": False}, (4, 4)),
}


@needs_native
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_fp32_equals_plain(name: str, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, grid = CASES[name]
    layer = make_layer(grid=grid, **arguments)
    layer.grad_checkpointing = recompute
    found = results(layer, grid, "native", torch.float32, bf16=False)
    monkeypatch.setattr(Tensor, "float", lambda tensor: tensor)  # the reference in double precision throughout
    expected = results(layer, grid, "plain", torch.float64, bf16=False)
    assert worst(found, expected) < 1e-5


@needs_native
@pytest.mark.parametrize("name", CASES)
def test_bf16_is_no_less_exact_than_autocast(name: str) -> None:
    arguments, grid = CASES[name]
    layer = make_layer(grid=grid, **arguments)
    exact = results(layer, grid, "plain", torch.float32, bf16=False)
    plain, found = (results(layer, grid, kernel, torch.float32, bf16=True) for kernel in ("plain", "native"))
    assert worst(found, exact, leave_out=SCALARS) < 1.5 * worst(plain, exact, leave_out=SCALARS)


@needs_native
@pytest.mark.parametrize("gta", [True, False])
@pytest.mark.parametrize(("dim", "num_heads", "grid"), [(96, 3, (4, 4)), (128, 8, (9, 9)), (64, 4, (6, 4))])
def test_coupling_alone_equals_plain(dim: int, num_heads: int, grid: Grid, gta: bool) -> None:
    coupling = cast("AttentionCoupling", make_layer(dim, num_heads, 2, grid, gta=gta).coupling)
    expected = coupling_results(coupling, grid, "plain", torch.float64, bf16=False)
    assert worst(coupling_results(coupling, grid, "native", torch.float32, bf16=False), expected) < 1e-5
    if build.library().bf16:
        rounded, plain = (coupling_results(coupling, grid, k, torch.float32, bf16=True) for k in ("native", "plain"))
        assert worst(rounded, expected) < 1.5 * worst(plain, expected)


@needs_native
def test_ablations_couple_natively() -> None:
    """What the kernel has no update for: its attention alone, the rest by PyTorch."""
    torch.manual_seed(0)
    layer = KuramotoLayer(64, 4, AttentionCoupling(64, 4, (4, 4)), num_steps=3, norm="clamp")
    for module in (layer.c_norm, layer.coupling):
        module.init_weights()
    x, c = torch.randn(2, 3, 16, 64).unbind()
    plain = layer(x, c, (4, 4))
    layer.kernel = layer.coupling.kernel = "native"
    found = layer(x, c, (4, 4))
    assert not torch.equal(found, plain)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)


def readout_results(readout: Readout, kernel: str, dtype: torch.dtype, *, bf16: bool) -> dict[str, Tensor]:
    """Norms and all gradients of a fixed random functional of them, in double precision."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 9, readout.linear.in_features, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(3, 9, readout.out_dim, generator=generator).to(dtype)
    readout = copy.deepcopy(readout).to(dtype)
    readout.kernel = kernel
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = readout(x)
    (y * weight).sum().backward()
    found = {"y": y, "x": x.grad, **{name: parameter.grad for name, parameter in readout.named_parameters()}}
    return {name: tensor.detach().double() for name, tensor in found.items()}


@needs_native
@pytest.mark.parametrize(("dim", "n", "out_dim"), [(64, 4, 64), (32, 2, 48), (128, 8, 128)])
def test_readout_equals_plain(dim: int, n: int, out_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    readout = Readout(dim, n, out_dim)
    torch.nn.init.normal_(readout.bias)
    found = readout_results(readout, "native", torch.float32, bf16=False)
    if build.library().bf16:
        rounded, plain = (readout_results(readout, kernel, torch.float32, bf16=True) for kernel in ("native", "plain"))
    monkeypatch.setattr(Tensor, "float", lambda tensor: tensor)  # the reference in double precision throughout
    expected = readout_results(readout, "plain", torch.float64, bf16=False)
    assert worst(found, expected) < 2e-6
    if build.library().bf16:
        assert worst(rounded, expected) < 1.5 * worst(plain, expected)


@needs_native
def test_without_gradients_equals_with(recwarn: pytest.WarningsRecorder) -> None:
    layer = make_layer(64, 4, 4, (4, 4))
    layer.kernel = "native"
    x, c = torch.randn(2, 3, 16, 64).unbind()
    with torch.no_grad():
        without = layer(x, c, (4, 4))
    assert torch.equal(without, layer(x, c, (4, 4)))


@needs_native
def test_same_bits_every_time_and_for_any_batch() -> None:
    layer = make_layer(64, 4, 4, (4, 4))
    layer.kernel = "native"
    x, c = torch.randn(2, 6, 16, 64).unbind()
    with torch.no_grad():
        whole = layer(x, c, (4, 4))
        assert torch.equal(whole, layer(x, c, (4, 4)))
        assert torch.equal(whole[4:], layer(x[4:], c[4:], (4, 4)))


@needs_native
@pytest.mark.parametrize("images", [1, 37])
def test_gradients_have_the_same_bits_however_threads_share_the_images(images: int) -> None:
    """Threads take images as they are ready; sums are over parts that do not depend on it."""
    layer, readout = make_layer(64, 4, 4, (4, 4)), Readout(64, 4)
    nn.init.normal_(readout.bias)
    layer.kernel = readout.kernel = "native"
    x, c = torch.randn(2, images, 16, 64).unbind()
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = [
            torch.autograd.grad(
                readout(layer(x, c, (4, 4))).square().sum(), [*layer.parameters(), *readout.parameters()]
            )
            for _ in range(10)
        ]
    finally:
        torch.set_num_threads(before)
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


@pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("g++") is None, reason="needs g++ on x86-64")
@pytest.mark.parametrize("processor", ["skylake-avx512", "cooperlake", "sapphirerapids"])
def test_compiles_for_processors_with_and_without_bf16_and_amx(processor: str) -> None:
    command = ["g++", *FLAGS, *build.FLAGS, f"-march={processor}", "-fsyntax-only", str(build.SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "bad value" in done.stderr:
        pytest.skip("this compiler does not know it")
    assert done.returncode == 0, done.stderr


def test_shapes_that_fit_no_vector_take_the_plain_path() -> None:
    assert not native.takes(96, 4, 8, torch.float32)
    assert not native.takes(48, 3, 3, torch.float32)
    assert not native.takes(128, 4, 8, torch.float64)
    assert not native.takes(128, 4, 8, torch.float16)


def test_without_a_compiler_the_plain_path_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AKORN_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    build.library.cache_clear()
    try:
        assert build.library().handle is None
        assert len(build.library().reason.splitlines()) == 1
        layer = make_layer(64, 4, 4, (4, 4))
        x, c = torch.randn(2, 3, 16, 64).unbind()
        plain = layer(x, c, (4, 4))
        layer.kernel = "native"
        assert torch.equal(layer(x, c, (4, 4)), plain)
    finally:
        build.library.cache_clear()


@needs_native
def test_an_empty_path_uses_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    build.library.cache_clear()
    try:
        assert build.library().handle is not None
    finally:
        build.library.cache_clear()
