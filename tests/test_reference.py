"""Published checkpoints: file formats, inferred arguments, errors that name what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.models.published import head_order, planes
from pretrain.models.reference import convert, load_published, read_state
from tests.plain.models import AKOrN, Classifier, ItrSA, Sudoku
from tests.plain.record import randomise

ARGUMENTS = {"n": 4, "ch": 32, "L": 2, "T": 3, "psize": 4, "imsize": 16, "heads": 4}


@pytest.fixture(scope="module")
def published() -> AKOrN:
    torch.manual_seed(0)
    model = AKOrN(**ARGUMENTS, use_ro_x=True).eval()
    with torch.no_grad():
        randomise(model)
    return model


@pytest.mark.parametrize("wrap", ["bare", "checkpoint", "ema", "parallel"])
def test_every_kind_of_file(wrap: str, published: AKOrN, tmp_path: Path) -> None:
    state = published.state_dict()
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    content = {
        "bare": state,
        "checkpoint": {"model_state_dict": state, "epoch": 3},
        "ema": {"initted": torch.tensor(True), "step": torch.tensor(9), **{f"online_model.{k}": v for k, v in
                other.items()}, **{f"ema_model.{k}": v for k, v in state.items()}},
        "parallel": {f"module.{name}": value for name, value in state.items()},
    }[wrap]  # fmt: skip
    torch.save(content, tmp_path / "ema_499.pth")
    found = load_published(tmp_path / "ema_499.pth", {"T": 3})
    images, start = torch.rand(2, 3, 16, 16), torch.randn(2, 8, 4, 4, 4)
    features = found.model((images - 0.5) / 0.5, start)
    assert found.projector is not None
    expected = published(images, start)["output"]
    torch.testing.assert_close(found.projector(features), expected, rtol=1e-4, atol=1e-4)
    assert found.arguments["heads"] == 4
    assert found.arguments["imsize"] == 16


def test_files_are_never_unpickled(tmp_path: Path) -> None:
    torch.save({"model": Path("x")}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="Weights only load failed"):
        read_state(tmp_path / "bad.pth")


@pytest.mark.parametrize("content", [b"", b"job: pretrain\nname: a\n", b"PK\x03\x04"])
@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_other_files_are_no_weights(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} cannot be read as weights"):
        read_state(tmp_path / name)


def test_contradicting_arguments_are_named(published: AKOrN) -> None:
    with pytest.raises(ValueError, match=r"ch=64 \(the tensors say 32\)"):
        convert(published.state_dict(), {"ch": 64, "T": 3})
    with pytest.raises(ValueError, match="unknown architecture arguments steps"):
        convert(published.state_dict(), {"steps": 3})
    with pytest.raises(ValueError, match="no_ro"):
        convert(published.state_dict(), {"no_ro": True})


def test_missing_and_unknown_tensors_are_named(published: AKOrN) -> None:
    state = dict(published.state_dict())
    weight = state.pop("layers.1.0.connectivity.W_o.bias")
    with pytest.raises(ValueError, match=r"missing layers\.1\.0\.connectivity\.W_o\.bias"):
        convert(state, {"T": 3})
    state["layers.1.0.connectivity.W_out.bias"] = weight
    with pytest.raises(ValueError, match=r"unknown layers\.1\.0\.connectivity\.W_out\.bias"):
        convert(state, {"T": 3})
    with pytest.raises(ValueError, match="neither patchfy"):
        convert({"conv1.weight": torch.zeros(1)}, {})


@pytest.mark.parametrize("network", [Sudoku(4, 32, 4, 4), Classifier(2, 4, 10, 2, 2, [3, 3]),
                                     ItrSA(16, 4, 32, 1, 4, 64, 2, False)])  # fmt: skip
def test_other_networks_are_recognised(network: torch.nn.Module) -> None:
    kinds = {"Sudoku": "sudoku_akorn", "Classifier": "classifier_akorn", "ItrSA": "itrsa"}
    arguments = {"heads": 4, "T": 2}
    found = convert(network.state_dict(), arguments)
    assert found.kind == kinds[type(network).__name__]
    assert not found.model.training


@pytest.mark.parametrize("heads", [2, 4])
def test_gta_matrices_tell_the_heads_of_a_sudoku_solver_too(heads: int) -> None:
    network = Sudoku(4, 32, 4, heads)
    assert convert(network.state_dict(), {"T": 4}).arguments["heads"] == heads
    with pytest.raises(ValueError, match=f"heads=8 .the tensors say {heads}"):
        convert(network.state_dict(), {"T": 4, "heads": 8})


def test_orders_are_permutations() -> None:
    state = torch.arange(24).view(6, 4)  # published (K, n)
    assert torch.equal(state.flatten()[planes(4, 24)], state.t().flatten())
    attention = torch.arange(24).view(4, 2, 3)  # published (P, 2, H)
    assert torch.equal(attention.flatten()[head_order(24, 3)], attention.permute(2, 1, 0).flatten())
