"""NT-Xent against naive loops, closed forms, the golden loss, and itself at other world sizes."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import Tensor

from pretrain.representation import describe
from pretrain.tasks.nt_xent import nt_xent
from pretrain.tasks.simclr import Simclr

SHARED = Path(os.environ.get("AKORN_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def naive_loss(embeddings: Tensor, samples: Tensor, temperature: float) -> Tensor:
    """Equation 1 of arXiv 2002.05709 anchor by anchor, differentiable by autograd."""
    vectors = embeddings.flatten(0, 1)
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    losses = []
    for i, anchor in enumerate(vectors):
        positive = anchor @ vectors[i ^ 1] / temperature
        others = [anchor @ vectors[j] / temperature for j in range(len(vectors)) if samples[j // 2] != samples[i // 2]]
        losses.append(torch.log(sum((o.exp() for o in others), positive.exp())) - positive)
    return torch.stack(losses).mean()


def batch(b: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(b, 2, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("block_elements", [1, 1 << 22])
@pytest.mark.parametrize("samples", [[5, 2, 9, 7, 1, 4], [5, 2, 5, 7, 5, 2]])
def test_value_and_gradient_against_loops(
    samples: list[int], block_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.tasks.nt_xent.LEAST_ROWS", 5)
    ours, plain = batch(6, 8).requires_grad_(), batch(6, 8).requires_grad_()
    loss, _ = nt_xent(ours, torch.tensor(samples), temperature=0.3, block_elements=block_elements)
    expected = naive_loss(plain, torch.tensor(samples), 0.3)
    (loss * 2).backward()
    (expected * 2).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-9, atol=1e-12)


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(lambda e: nt_xent(e, temperature=0.5)[0], batch(4, 5).requires_grad_())


def test_closed_forms() -> None:
    same = torch.ones(16, 2, 8)
    assert nt_xent(same)[0].item() == pytest.approx(math.log(2 * 16 - 1), rel=1e-6)
    one_image = nt_xent(same, torch.zeros(16, dtype=torch.int64))
    assert one_image[0].item() == 0  # no negatives: the positive is all there is
    apart = torch.eye(4).repeat_interleave(2, 0).unflatten(0, (4, 2))
    loss, accuracy = nt_xent(apart, temperature=0.1)
    assert loss.item() == pytest.approx(math.log(1 + 6 * math.exp(-10)), rel=1e-4)
    assert accuracy.item() == 1


def test_accuracy_counts_anchors_whose_positive_is_nearest() -> None:
    # Images 0 and 1 exchange their second views: all four anchors prefer a negative; image 2 is apart.
    axes = torch.eye(3)
    embeddings = torch.stack((axes, axes[[1, 0, 2]]), 1)
    assert nt_xent(embeddings)[1].item() == pytest.approx(2 / 6)


def test_large_logits_stay_finite() -> None:
    embeddings = batch(8, 4).float().requires_grad_()
    loss, _ = nt_xent(embeddings, temperature=0.001)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(embeddings.grad).all()


def test_half_precision_embeddings_under_autocast_are_computed_in_fp32() -> None:
    embeddings = batch(8, 16).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = nt_xent(embeddings)
    assert loss.dtype == torch.float32
    expected = naive_loss(embeddings.double(), torch.arange(8), 0.1).float()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(4, 3, 8), (4, 8)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="two views"):
        nt_xent(torch.ones(shape))


@pytest.mark.skipif(not (SHARED / "golden").is_dir(), reason="no golden tensors beside the checkout")
def test_published_loss_and_gradients() -> None:
    golden = load_file(SHARED / "golden" / "simclr_loss.safetensors")
    embeddings = torch.stack((golden["view0"], golden["view1"]), 1).requires_grad_()
    loss, _ = nt_xent(embeddings, temperature=0.1)
    loss.backward()
    torch.testing.assert_close(loss[None], golden["loss"], rtol=1e-5, atol=0)
    for view in (0, 1):
        expected = golden[f"grad{view}"]
        torch.testing.assert_close(embeddings.grad[:, view], expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def rank_part(rank: int, world_size: int, port: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    embeddings = batch(8, 6).chunk(world_size)[rank].clone().requires_grad_()
    samples = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6]).chunk(world_size)[rank]
    loss, accuracy = nt_xent(embeddings, samples)
    loss.backward()
    figures = Simclr.describe(embeddings.detach())
    torch.save({"loss": loss.detach(), "accuracy": accuracy, "grad": embeddings.grad, **figures}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_equal_one_process(world_size: int, tmp_path: Path, free_port: str) -> None:
    mp.spawn(rank_part, (world_size, free_port, str(tmp_path)), nprocs=world_size)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world_size)]
    whole = batch(8, 6).requires_grad_()
    loss, accuracy = nt_xent(whole, torch.tensor([3, 1, 4, 1, 5, 9, 2, 6]))
    loss.backward()
    for part in parts:
        torch.testing.assert_close(part["loss"], loss.detach(), rtol=1e-13, atol=0)
        assert part["accuracy"] == accuracy
        for name, figure in describe(whole.detach()).items():
            torch.testing.assert_close(part[name], figure)
    torch.testing.assert_close(torch.cat([part["grad"] for part in parts]), whole.grad, rtol=1e-12, atol=1e-14)


@pytest.fixture
def free_port() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
