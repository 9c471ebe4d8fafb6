"""The training stream as batches: exact, elastic, fast.

`loader[step]` is this rank's part of the global batch of a step, for any step: what stands where is decided by the
order alone (order.py), what happens to a sample by its key alone (fetch.py), so that ranks, workers, prefetch and
restarts change nothing. Nothing needs to be saved to resume.

Paths: workers > 0: processes fill batches ahead in shared memory (workers.py). workers = 0: in the caller, for small
images on few cores; at its cheapest with data.keep: memory. data.keep: device: views are cropped on the device from
images kept there (keep.py).
"""

from __future__ import annotations

import os
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema import Data, Loading
from pretrain.data import fetch, workers
from pretrain.data.batch import Batch
from pretrain.data.fetch import Fetcher
from pretrain.data.index import ShardIndex
from pretrain.data.keep import Kept, KeptViews
from pretrain.data.ledger import Ledger
from pretrain.data.location import is_remote
from pretrain.data.memory import Layout
from pretrain.data.order import Order
from pretrain.data.scan import DEFAULT_KEY
from pretrain.data.shards import ShardReader
from pretrain.data.staging import Staging
from pretrain.data.transfer import Transfer
from pretrain.data.views import SimclrTransform

INT64 = np.dtype(np.int64)
MOST_WORKERS = 16


class Loader:
    """Batches of a shard set.

    Args:
        data: what is read. loading: how fast.
        transform: what is done to a sample on the host (fetch.Transform).
        seed: of the stream and all that is random in it.
        batch_size: images per step over all ranks.
        rank, world_size: which part is ours.
        device: where batches go.
        ledger: skipped.jsonl of the run; None: broken samples are only counted.
        once: calls what one of the ranks does for all: to look at every shard is a million calls of the file system on
            a thousand ranks. What it raises, it raises on all of them (distributed.once).

    Attributes:
        wait_s: seconds that the last `loader[step]` kept its caller waiting.

    Raises:
        UserError: shards missing or changed, or a batch that the ranks do not divide.
    """

    def __init__(
        self,
        data: Data,
        loading: Loading,
        transform: fetch.Transform,
        *,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        ledger: Path | None = None,
        once: Callable[[Callable[[], None]], None] = lambda work: work(),
    ) -> None:
        if batch_size % world_size:
            raise UserError(f"batch_size={batch_size} is not a multiple of the {world_size} processes")
        self.seed, self.batch_size, self.rank, self.world_size = seed, batch_size, rank, world_size
        self.device = torch.device(device)
        self.wait_s = 0.0
        shards = data.shards if isinstance(data.shards, str) else list(data.shards)
        self.index = ShardIndex.open(
            shards,
            parts=data.parts or None,
            key_pattern=data.key_pattern or DEFAULT_KEY,
            cache_dir=loading.cache_dir,
            check=False,
        )
        _check_parts(self.index, transform)
        once(lambda: _check_sizes(self.index, data.max_broken))
        self.order = Order(
            self.index.shard_sizes, seed=seed, window=data.window, lanes=data.lanes, batch_size=batch_size
        )
        self.ledger = Ledger(ledger, num_samples=len(self.index), max_broken=data.max_broken)
        self._files = _reader(self.index, loading)
        self._fetcher = Fetcher(self._files, transform, seed, len(self.index))
        self._kept_views: KeptViews | None = None
        if data.keep != "disk":
            self._keep(data, transform)
        self._plans: OrderedDict[int, int] = OrderedDict()  # step -> slot
        self._layout = self._make_layout()
        self._pool: workers.Pool | None = None
        self._transfer: Transfer | None = None
        self.num_workers = 0 if data.keep == "device" else _num_workers(loading, self.device)
        if self.num_workers:
            self._pool = self._make_pool(loading)
            self._transfer = Transfer(self.device, self._pool.memory.bytes())

    def __len__(self) -> int:
        """Samples in an epoch."""
        return len(self.index)

    @property
    def staging(self) -> Staging | None:
        """Where remote shards are staged; None for local ones."""
        return self._files.cache

    def positions(self, step: int) -> np.ndarray:
        """Places in the training stream of this rank's part of a step, int64 [batch_size / world_size]."""
        share = self.batch_size // self.world_size
        first = step * self.batch_size + self.rank * share
        return np.arange(first, first + share, dtype=np.int64)

    def __getitem__(self, step: int) -> Batch:
        """This rank's part of a step, its tensors on the device.

        Raises:
            UserError: too many broken samples.
            LoaderError, StagingError: data can no longer be read.
        """
        begin = time.perf_counter()
        batch = self._from_workers(step) if self._pool is not None else self._in_caller(step)
        self.wait_s = time.perf_counter() - begin
        return batch

    def close(self) -> None:
        """End the workers and close the shards."""
        if self._pool is not None:
            self._pool.close()
        if self._transfer is not None:
            self._transfer.close()
        self._files.close()

    def advice(self) -> str:
        """What to do when the training waits for data, in words."""
        if self._pool is None:
            return "data is the bottleneck: give the loader processes of its own (loading.workers)"
        read, transform = self._pool.stage_s.sum(0)
        if read > transform:
            remedy = "reading is slow: copy the shards to a local disk, or stage them (loading.cache_dir)"
        elif self.num_workers < _cores() - 1:
            remedy = f"raise loading.workers (now {self.num_workers}; this process may use {_cores()} cores)"
        else:
            remedy = "store the images smaller (make_shards.py --resize 320), or keep a small set decoded (data.keep)"
        return f"data is the bottleneck, {transform / max(read + transform, 1e-9):.0%} of it decoding: {remedy}"

    def _from_workers(self, step: int) -> Batch:
        assert self._pool is not None
        assert self._transfer is not None
        if step not in self._plans:
            self._drain()
        self._plan_from(step)
        slot = self._plans[step]
        skipped = self._pool.wait(slot)
        arrays = dict(self._pool.slots[slot])
        places = {name: torch.from_numpy(arrays.pop(name).copy()) for name in ("epochs", "samples")}
        batch = self._batch(step, self._transfer.copy(slot, arrays), **places)
        del self._plans[step]
        if self.device.type == "cpu":
            self._plan_from(step + 1)  # elsewhere the slot's copy may still run: at the next step
        self.ledger.add(len(batch), skipped)
        return batch

    def _plan_from(self, step: int) -> None:
        """Have the steps from `step` on filled, as far as slots are free."""
        assert self._pool is not None
        assert self._transfer is not None
        free = sorted(set(range(len(self._pool.slots))) - set(self._plans.values()))
        for ahead in range(step, step + len(self._pool.slots)):
            if ahead in self._plans or not free:
                continue
            slot = self._plans[ahead] = free.pop()
            self._transfer.wait(slot)
            positions = self.positions(ahead)
            arrays = self._pool.slots[slot]
            arrays["epochs"][:], arrays["samples"][:] = self.order.at(positions)
            self._stage_ahead(positions)
            self._pool.submit(slot)

    def _drain(self) -> None:
        """Forget what was planned: the caller jumped to another step."""
        assert self._pool is not None
        while self._plans:
            self._pool.wait(self._plans.popitem()[1])

    def _in_caller(self, step: int) -> Batch:
        positions = self.positions(step)
        epochs, samples = self.order.at(positions)
        self._stage_ahead(positions)
        if self._kept_views is not None:
            samples, views, skipped = self._kept_views(epochs, samples)
            tensors = {"images": views.to(self.device)}
        else:
            arrays = {name: np.empty(shape, dtype) for name, (shape, dtype) in self._layout.items()}
            arrays["epochs"][:], arrays["samples"][:] = epochs, samples
            skipped = workers.fill(self._fetcher, arrays, range(len(positions)))
            epochs, samples = arrays.pop("epochs"), arrays.pop("samples")
            tensors = {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}
        self.ledger.add(len(positions), skipped)
        return self._batch(step, tensors, epochs=torch.from_numpy(epochs), samples=torch.from_numpy(samples))

    def _batch(self, step: int, tensors: dict[str, Tensor], *, epochs: Tensor, samples: Tensor) -> Batch:
        positions = torch.from_numpy(self.positions(step))
        return Batch(tensors, samples=samples, epochs=epochs, positions=positions, seed=self.seed)

    def _stage_ahead(self, positions: np.ndarray) -> None:
        """Have remote shards of the next window fetched while this one is used."""
        if self._files.cache is None:
            return
        lanes = self.order.lanes
        shares = positions[:: max(1, self.order.lane_share)] if lanes > 1 else positions[:1]
        for position in shares.tolist():
            self._files.prefetch(self.order.coming_shards(position, 2 * self.order.window))

    def _keep(self, data: Data, transform: fetch.Transform) -> None:
        only = getattr(transform, "parts", None)
        kept = Kept(self._files, only=only, max_pixels=data.max_pixels, writes=self.rank == 0)
        self._fetcher.reader = kept
        if isinstance(transform, SimclrTransform):
            self._kept_views = KeptViews(kept, transform, self.device if data.keep == "device" else None)
        elif data.keep == "device":
            raise UserError("data.keep=device is for task simclr; use data.keep=memory")

    def _make_layout(self) -> Layout:
        """Shapes and types of this rank's arrays, from the first sample of the stream that can be used."""
        rows = self.batch_size // self.world_size
        layout: dict[str, tuple[tuple[int, ...], np.dtype]] = {"epochs": ((rows,), INT64), "samples": ((rows,), INT64)}
        if self._kept_views is None or self._kept_views.images is None:
            epochs, samples = self.order.at(self.positions(0)[:1])
            _, arrays, _ = next(self._fetcher.fetch(epochs, samples))
            layout |= {name: ((rows, *array.shape), array.dtype) for name, array in arrays.items()}
        return layout

    def _make_pool(self, loading: Loading) -> workers.Pool:
        timeout_s = loading.timeout_s
        if self._files.cache is not None:  # staging has time-outs and retries of its own, which know more
            timeout_s *= loading.retries + 2
        return workers.Pool(
            self._fetcher,
            self._layout,
            workers=self.num_workers,
            slots=loading.prefetch + (1 if self.device.type == "cpu" else 2),
            timeout_s=timeout_s,
        )


def _check_parts(index: ShardIndex, transform: fetch.Transform) -> None:
    """Refuse a set whose samples have nothing that the transform reads, rather than to find each of them broken."""
    wanted, there = getattr(transform, "parts", None), index.part_names
    if wanted is not None and not set(wanted) & set(there):
        raise UserError(
            f"no image in {index.location.base}: the samples have {', '.join(there[:10])}; say which of them it is in "
            "data.parts, {image: NAME}, or how names are cut into keys and parts in data.key_pattern"
        )


def _check_sizes(index: ShardIndex, max_broken: float) -> None:
    """Refuse a set that changed since it was indexed; where little of it did, a run that is started again goes on."""
    changed = [shard for shard, size in index.location.local_sizes() if size != index.shard_bytes[shard]]
    if not changed:
        return
    if index.shard_sizes[changed].sum() > max_broken * len(index):
        index.check_sizes()
    names = ", ".join(index.shard_name(shard) for shard in changed[:5]) + (", ..." if len(changed) > 5 else "")
    warnings.warn(
        f"{len(changed)} shards changed since they were indexed ({names}); what cannot be read of them is replaced "
        "(data.max_broken allows it)",
        stacklevel=3,
    )


def _num_workers(loading: Loading, device: torch.device) -> int:
    """Processes per rank: as asked for; else, beside a GPU, this process's cores but one, and none on CPU."""
    if loading.workers is not None:
        return loading.workers
    if device.type == "cpu":
        return 0
    return min(MOST_WORKERS, max(1, _cores() - 1))


def _cores() -> int:
    """Cores of this process: its own (AKORN_CORES), to which SLURM mostly binds it, else its share of the node's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    own = os.environ.get("AKORN_CORES")
    return min(cores, int(own)) if own else max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _reader(index: ShardIndex, loading: Loading) -> ShardReader:
    """Reads local shards where they lie, remote ones through the staging folder."""
    if not is_remote(index.url(0)):
        return ShardReader(index)
    if loading.cache_dir is None:
        raise UserError(f"{index.url(0)} is remote: set loading.cache_dir to a node-local folder")
    limit = loading.cache_gb * 1e9
    staging = Staging(loading.cache_dir, limit_bytes=limit, timeout_s=loading.timeout_s, retries=loading.retries)
    return ShardReader(index, staging)
