"""Exact gradients of a loss over the global batch from chunks that fit into memory.

Owns: how a rank's part of the batch is cut, and the two passes of a loss that looks at all embeddings at once
("Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", Gao et al., arXiv 2101.06983): embed all
chunks without gradients, take the loss and its gradient at the embeddings, then embed each chunk again and send its
part of that gradient back. The number of negatives thus depends neither on memory nor on the number of ranks.

Legend: b images of this rank, W ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pretrain.data.batch import Batch
    from pretrain.engine import Engine
    from pretrain.tasks import Task

Metrics = dict[str, Tensor]


def chunks(size: int, micro_batch: int | None) -> list[slice]:
    """Cut `size` samples into as few chunks of at most `micro_batch` as possible, of equal size but for the last."""
    count = -(-size // (micro_batch or size))
    step = -(-size // count)
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def backward(
    engine: Engine, task: Task, batch: Batch, micro_batch: int | None, *, seed: int = 0, describe: bool = False
) -> Metrics:
    """Accumulate the gradient of the global loss and return its metrics with "loss" among them (collective).

    `seed` starts torch's generator for each chunk, so that dropout and the like draw the same in both passes. Metrics
    of separable tasks are means over this rank's samples; those of other tasks are global already. `describe` adds what
    the task's own `describe` says of the embeddings, if it has one (collective).
    """
    parts = [batch[cut] for cut in chunks(len(batch), micro_batch)]
    if task.separable:
        return _backward_separable(engine, task, parts, len(batch), seed)
    if len(parts) == 1:
        _seed(seed, 0)
        embeddings = engine.embed(batch)
        loss, metrics = task.loss(embeddings, batch)
        engine.backward(loss * engine.ranks.world_size, last=True)
        return {"loss": loss.detach(), **metrics, **_described(task, embeddings, describe)}
    return _backward_twice(engine, task, batch, parts, seed, describe)


def _backward_separable(engine: Engine, task: Task, parts: list[Batch], size: int, seed: int) -> Metrics:
    total: Metrics = {}
    for index, part in enumerate(parts):
        _seed(seed, index)
        embeddings = engine.embed(part)
        loss, metrics = task.loss(embeddings, part)
        share = len(part) / size
        engine.backward(loss * share, last=index == len(parts) - 1)
        for name, value in {"loss": loss.detach(), **metrics}.items():
            total[name] = total[name] + value * share if name in total else value * share
    return total


def _backward_twice(engine: Engine, task: Task, batch: Batch, parts: list[Batch], seed: int, describe: bool) -> Metrics:
    outputs = []
    with torch.no_grad():
        for index, part in enumerate(parts):
            _seed(seed, index)
            outputs.append(engine.embed(part))
    embeddings = torch.cat(outputs).float().requires_grad_()
    loss, metrics = task.loss(embeddings, batch)
    # The surrogate below may stay finite where the loss is not: its gradient tells the engine.
    scale = torch.where(loss.detach().isfinite(), float(engine.ranks.world_size), torch.nan)
    (gradient,) = torch.autograd.grad(loss * scale, embeddings)
    for index, (part, part_gradient) in enumerate(zip(parts, gradient.split([len(part) for part in parts]))):
        _seed(seed, index)
        again = engine.embed(part)
        engine.backward((again.float() * part_gradient).sum(), last=index == len(parts) - 1)
    return {"loss": loss.detach(), **metrics, **_described(task, embeddings, describe)}


def _described(task: Task, embeddings: Tensor, wanted: bool) -> Metrics:
    describe = getattr(task, "describe", None)
    return describe(embeddings.detach()) if wanted and describe is not None else {}


def _seed(seed: int, index: int) -> None:
    """Start torch's generators from (seed, index), so that nothing of a chunk depends on what ran before it."""
    torch.manual_seed((seed * 1_000_003 + index) % (1 << 63))
