"""Optimizers: which parameters decay, and LARS.

Owns: the parameter groups (weight decay falls on matrices only) and the optimizers by name. All of them take two
tensors before a step, as torch's fused Adam does: `found_inf` (1 skips the step on the device) and `grad_scale` (what
gradients are divided by, here for clipping), so that neither costs a synchronisation with the host.

LARS: "Large Batch Training of Convolutional Networks", You et al., arXiv 1708.03888: per parameter with decay
    v <- momentum * v + lr * trust * |w| / |g + wd * w| * (g + wd * w),   w <- w - v
and plain momentum for parameters without decay, as SimCLR and its descendants use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import Optimizer as OptimizerConfig


def no_decay_names(module: nn.Module) -> set[str]:
    """Names of parameters without weight decay: vectors and scalars, and what a submodule's `no_weight_decay` lists."""
    names = {name for name, p in module.named_parameters() if p.ndim <= 1}
    for prefix, child in module.named_modules():
        listed = getattr(child, "no_weight_decay", None)
        if callable(listed):
            names |= {f"{prefix}.{name}".lstrip(".") for name in listed()}
    return names


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the optimizer's groups: matrices with decay, the rest without; empty ones are left out."""
    exempt = no_decay_names(module)
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    decayed = {"params": [p for name, p in trained if name not in exempt], "weight_decay": weight_decay}
    others = {"params": [p for name, p in trained if name in exempt], "weight_decay": 0.0}
    return [group for group in (decayed, others) if group["params"]]


def make_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return the optimizer that the configuration names over the module's parameters."""
    groups = parameter_groups(module, config.weight_decay)
    if config.name == "lars":
        return Lars(groups, lr=config.lr, momentum=config.momentum, trust=config.trust)
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


class Lars(torch.optim.Optimizer):
    """LARS over groups; those with `weight_decay` 0 are neither decayed nor adapted."""

    def __init__(
        self, params: Iterable[dict[str, Any]], *, lr: float, momentum: float = 0.9, trust: float = 1e-3
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Apply one update; closures are not supported."""
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        scale, bad = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        gradient = p.grad if scale is None else p.grad / scale
        if group["weight_decay"] > 0:
            gradient = gradient + group["weight_decay"] * p
            norm, size = p.norm(), gradient.norm()
            adapted = group["trust"] * norm / size
            gradient = gradient * torch.where((norm > 0) & (size > 0), adapted, torch.ones_like(adapted))
        velocity = group["momentum"] * state["momentum_buffer"] + group["lr"] * gradient
        if bad is not None:  # a non-finite gradient leaves weights and momentum as they are
            velocity = torch.where(bad > 0, state["momentum_buffer"], velocity)
            p.copy_(torch.where(bad > 0, p, p - velocity))
        else:
            p.sub_(velocity)
        state["momentum_buffer"].copy_(velocity)
