"""NT-Xent, the contrastive loss of SimCLR, over the global batch of all ranks, with memory linear in the batch.

"A Simple Framework for Contrastive Learning of Visual Representations", Chen et al., arXiv 2002.05709, equation 1:

    loss_i = log( exp(s_ip) + sum_j exp(s_ij) ) - s_ip,      s_ij = <z_i, z_j> / temperature,   |z_i| = 1

with p the other view of the same position and j over every embedding of another image; the loss is the mean over all
2B anchors of the global batch. Deviation from the paper: positions of a batch that hold the same image (an epoch
boundary, a tiny data set) are no negatives of each other.

A rank computes its own anchors against all candidates, in blocks of rows, and keeps no block. Its gradient needs no
sum over ranks: s is symmetric, so what the anchors of other ranks send back to a local embedding follows from their
log-sum-exp alone, with P_ij = exp(s_ij - lse_i):

    dloss/dz_i = 1 / (2 B temperature) * ( sum_j (P_ij + P_ji) z_j - 2 z_p ),   j over negatives and the positive

so the gather of one number per anchor stands for the reduce-scatter of the gradients of all candidates, and one of
the three products of the backward is spared.

Legend: B images of the global batch, b of this rank, M = 2b local anchors, N = 2B candidates, d embedding size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

BLOCK_ELEMENTS = 1 << 22  # entries of the similarity matrix held at a time: 16 MiB in fp32
LEAST_ROWS = 64  # below, the products no longer reach the speed of the machine


def nt_xent(
    embeddings: Tensor,
    samples: Tensor | None = None,
    *,
    temperature: float = 0.1,
    block_elements: int = BLOCK_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """Loss of the global batch and the share of anchors whose positive is nearer than every negative.

    embeddings [b, 2, d]: this rank's part, any scale (normalised here); b is the same on all ranks.
    samples [b] int64: identity of each image over all ranks; None: every position is an image of its own.
    Collective when torch.distributed is initialised: every rank calls it. Both results are scalars, fp32
    (fp64 for fp64 embeddings) and equal on all ranks. The gradient at `embeddings` is that of the *global* loss:
    parameter gradients of the ranks are to be summed, not averaged.
    """
    if embeddings.ndim != 3 or embeddings.shape[1] != 2:
        raise ValueError(f"nt_xent takes embeddings [b, 2, d], two views of each image, not {list(embeddings.shape)}")
    if samples is not None and samples.shape != embeddings.shape[:1]:
        raise ValueError(f"samples {list(samples.shape)} must name each of the {len(embeddings)} images")
    with torch.autocast(embeddings.device.type, enabled=False):
        precise = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
        anchors = F.normalize(precise, dim=-1).flatten(0, 1)  # [M, d], order (sample, view)
        loss, accuracy = _NTXent.apply(anchors, samples, temperature, block_elements)
    return loss, accuracy


class _NTXent(torch.autograd.Function):
    """NT-Xent of unit vectors; saves the gathered embeddings, identities and log-sum-exps, nothing quadratic."""

    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,  # [M, d]
        samples: Tensor | None,  # [M / 2]
        temperature: float,
        block_elements: int,
    ) -> tuple[Tensor, Tensor]:
        candidates = gather(anchors)  # [N, d]
        if samples is None:
            identities = torch.arange(len(candidates), device=anchors.device) // 2
        else:
            identities = gather(samples).repeat_interleave(2)
        first = _first_row(anchors)
        positive = (anchors.unflatten(0, (-1, 2)).prod(1).sum(-1) / temperature).repeat_interleave(2)  # [M]
        negative_lse, hardest = torch.empty_like(positive), torch.empty_like(positive)
        for rows in _blocks(len(anchors), len(candidates), block_elements):
            s = _similarities(anchors, candidates, identities, first, rows, temperature)
            negative_lse[rows], hardest[rows] = torch.logsumexp(s, 1), s.amax(1)
        losses = F.softplus(negative_lse - positive)  # lse - positive without cancellation where the loss is small
        # One gather, so that every rank sums the same numbers in the same order.
        per_anchor = gather(torch.stack((losses + positive, losses, (positive > hardest).to(losses)), 1))
        ctx.save_for_backward(candidates, identities, per_anchor[:, 0].contiguous(), losses)
        ctx.first, ctx.temperature, ctx.block_elements = first, temperature, block_elements
        loss, accuracy = per_anchor[:, 1:].mean(0).unbind()
        ctx.mark_non_differentiable(accuracy)
        return loss, accuracy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        candidates, identities, lse_all, losses = ctx.saved_tensors
        local = slice(ctx.first, ctx.first + len(losses))
        anchors, lse = candidates[local], lse_all[local]
        gradient = torch.empty_like(anchors)
        for rows in _blocks(len(anchors), len(candidates), ctx.block_elements):
            s = _similarities(anchors, candidates, identities, ctx.first, rows, ctx.temperature)
            weight = (s - lse[rows, None]).exp_()  # P_ij
            weight += s.sub_(lse_all).exp_()  # P_ji
            torch.mm(weight, candidates, out=gradient[rows])
        pull = torch.expm1(-losses).unflatten(0, (-1, 2)).sum(1)  # [b]: P_ip + P_pi - 2
        gradient += (pull[:, None, None] * anchors.unflatten(0, (-1, 2)).flip(1)).flatten(0, 1)
        return gradient * (grads[0] / (len(candidates) * ctx.temperature)), None, None, None


def _similarities(
    anchors: Tensor, candidates: Tensor, identities: Tensor, first: int, rows: slice, temperature: float
) -> Tensor:
    """[rows, N] logits against the negatives; -inf where the candidate shows the anchor's own image."""
    s = (anchors[rows] / temperature) @ candidates.T
    own = identities[first + rows.start : first + rows.stop, None]
    return s.masked_fill_(own == identities, -torch.inf)


def _blocks(num_rows: int, num_columns: int, elements: int) -> list[slice]:
    step = max(elements // max(num_columns, 1), LEAST_ROWS)
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _first_row(anchors: Tensor) -> int:
    return dist.get_rank() * len(anchors) if _world_size() > 1 else 0


def gather(tensor: Tensor) -> Tensor:
    """Parts of all ranks one after the other along the first dimension (collective)."""
    world_size = _world_size()
    if world_size == 1:
        return tensor
    whole = tensor.new_empty((world_size * len(tensor), *tensor.shape[1:]))
    dist.all_gather_single(whole, tensor.contiguous())
    return whole
