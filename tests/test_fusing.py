"""Functions that are compiled on GPUs: when, and when not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pretrain import fusing


def where(x: Tensor) -> str:
    """Runs as it is."""
    return "plain"


@pytest.fixture(autouse=True)
def _compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Something that can be told from the function, in the place of torch's compiler."""
    monkeypatch.setattr(torch, "compile", lambda function: lambda x: "compiled")
    yield
    fusing.allow(True)


def test_on_the_cpu_a_function_runs_as_it_is() -> None:
    fused = fusing.fused_on_gpu(where)
    assert fused(torch.zeros(1)) == "plain"
    assert fused.__doc__ == where.__doc__


def test_on_a_gpu_it_is_compiled_where_that_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(fusing, "find_compiler", lambda: "c++")
    fused = fusing.fused_on_gpu(where)
    assert fused(torch.zeros(1)) == "compiled"
    fusing.allow(False)
    assert fused(torch.zeros(1)) == "plain"


def test_without_a_compiler_it_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(fusing, "find_compiler", lambda: None)
    assert fusing.fused_on_gpu(where)(torch.zeros(1)) == "plain"


def test_fake_tensors_are_not_compiled_for() -> None:
    with FakeTensorMode():
        x = torch.empty(1, device="cuda")
    assert x.is_cuda
    assert fusing.fused_on_gpu(where)(x) == "plain"
