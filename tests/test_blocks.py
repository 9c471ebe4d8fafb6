"""Memory that is used again by the next step: a block is lent once at a time, a training keeps as many as it needs."""

from __future__ import annotations

import pytest
import timm
import torch

import pretrain  # noqa: F401  (registers the models)
from pretrain import kernels
from pretrain.blocks import LEAST, Blocks
from pretrain.models.kernels.build import library

LARGE = (LEAST,)


def test_a_block_is_lent_again_once_all_its_tensors_are_gone() -> None:
    blocks = Blocks()
    first = blocks.empty(LARGE, torch.float32)
    address, part = first.data_ptr(), first[5:]
    second = blocks.empty(LARGE, torch.float32)
    del first
    assert len({address, second.data_ptr(), blocks.empty(LARGE, torch.float32).data_ptr()}) == 3  # `part` lives
    del part
    assert blocks.empty(LARGE, torch.float32).data_ptr() == address


def test_what_a_backward_needs_is_lent_until_it_is_gone() -> None:
    blocks = Blocks()
    weight = torch.ones(LARGE, requires_grad=True)
    given = blocks.empty(LARGE, torch.float32)
    given.fill_(3)
    address = given.data_ptr()
    out = (weight * given).sum()  # autograd alone holds it now
    del given
    other = blocks.empty(LARGE, torch.float32)
    assert other.data_ptr() != address
    other.fill_(0)
    out.backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full(LARGE, 3.0))
    assert blocks.empty(LARGE, torch.float32).data_ptr() == address


def test_blocks_take_any_type_and_the_smallest_that_fits_is_chosen() -> None:
    blocks = Blocks()
    sizes = {4 * LEAST: 0, LEAST: 0, 2 * LEAST: 0}
    tensors = {size: blocks.empty((size,), torch.uint8) for size in sizes}
    addresses = {size: tensor.data_ptr() for size, tensor in tensors.items()}
    assert all(address % 64 == 0 for address in addresses.values())
    tensors.clear()
    half = blocks.empty((LEAST - 8, 1), torch.bfloat16)
    assert (half.dtype, half.shape, half.data_ptr()) == (torch.bfloat16, (LEAST - 8, 1), addresses[2 * LEAST])
    small = blocks.empty((4,), torch.float32)
    assert small.data_ptr() not in addresses.values()


def test_a_block_that_is_too_small_makes_room_for_a_larger_one() -> None:
    blocks = Blocks()
    for factor in (1, 2, 3):
        blocks.empty((factor * LEAST,), torch.uint8)
    assert [memory.nbytes for memory, _ in blocks._blocks] == [3 * LEAST]


@pytest.mark.skipif(library().handle is None, reason="the native kernels are not for this machine")
def test_a_second_graph_leaves_the_first_ones_gradients_alone() -> None:
    """Two forwards before any backward, one of them kept for two: as with the C library's memory."""
    model = timm.create_model("akorn_nano_patch4_32", num_classes=0, num_steps=3)
    kernels.fastest(model.train())
    generator = torch.Generator().manual_seed(0)
    images, start = torch.randn(2, 8, 3, 32, 32, generator=generator), torch.randn(1, 64, 128, generator=generator)
    parameters = list(model.parameters())

    def gradients(output: torch.Tensor, **options: bool) -> list[torch.Tensor]:
        return [g.clone() for g in torch.autograd.grad(output.square().sum(), parameters, **options)]

    alone = [gradients(model(view, start)) for view in images]
    first, second = (model(view, start) for view in images)
    together = [gradients(first, retain_graph=True), gradients(second), gradients(first)]
    for ours, expected in zip(together, [*alone, alone[0]], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
