"""Batches: slices are views, and randomness follows the samples."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pretrain.data import counter, crop
from pretrain.data.batch import Batch


def make_batch(count: int = 6) -> Batch:
    places = torch.arange(count)
    tensors = {"images": torch.arange(count * 4).view(count, 4), "label": places * 2}
    return Batch(tensors, samples=places * 10**9, epochs=places // 2, positions=places + 100, seed=3)


def test_slices_are_views_of_all_parts() -> None:
    batch = make_batch()
    part = batch[2:5]
    assert len(part) == 3
    assert part.tensors["images"].data_ptr() == batch.tensors["images"][2].data_ptr()
    assert part.positions.tolist() == [102, 103, 104]
    assert part.samples.tolist() == [2 * 10**9, 3 * 10**9, 4 * 10**9]
    assert part.epochs.tolist() == [1, 1, 2]


def test_keys_are_those_of_the_samples() -> None:
    keys = make_batch().keys_for("start", view=1)
    expected = [counter.key_int(3, place // 2, place * 10**9, 1, "start") for place in range(6)]
    assert [key & counter.MASK for key in keys.tolist()] == expected


def test_starts_do_not_depend_on_the_chunk() -> None:
    batch = make_batch()
    whole = batch.starts((5, 8), view=0)
    assert whole.shape == (6, 5, 8)
    assert torch.equal(torch.cat([batch[:1].starts((5, 8)), batch[1:].starts((5, 8))]), whole)
    assert not torch.equal(batch.starts((5, 8), view=1), whole)


def test_moving_leaves_the_places_on_the_host() -> None:
    batch = make_batch().to("meta")
    assert batch.device.type == "meta"
    assert batch.samples.device.type == "cpu"


def test_starts_and_crops_on_a_gpu_stay_there() -> None:
    """With fake CUDA tensors."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        starts = counter.normal(torch.empty(4, dtype=torch.int64, device="cuda"), (5, 8))
        images = torch.empty(4, 3, 30, 40, dtype=torch.uint8, device="cuda")
        views = crop.resized_batch(images, torch.empty(4, 4, dtype=torch.int64, device="cuda"), 16)
    assert starts.device.type == views.device.type == "cuda"
    assert starts.shape == (4, 5, 8)
    assert views.shape == (4, 3, 16, 16)
