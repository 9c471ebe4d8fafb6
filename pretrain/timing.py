"""How long a training step takes, part by part, and what it needs: measured by running steps, several kinds in turn.

FLOPs are counted by torch's own counter on one view (products only), training taken as three times the forward. The
peak is that of a square matrix product in the type of the step, measured before and after each: machines change.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from pretrain import blocks
from pretrain.quiet import quiet

PARTS = ("data", "forward", "loss", "backward", "communication", "optimizer")
COLLECTIVES = ("all_gather_single", "all_reduce", "reduce_scatter_tensor", "broadcast", "all_gather")
PEAK_SIZE = {"cpu": 1024, "cuda": 8192}


@dataclass
class Clock:
    """Seconds of each part of one step; communication is taken out of the part it happens in."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what runs inside (device sync at both ends)."""
        before, start = self.seconds["communication"], self.now()
        yield
        took = self.now() - start
        self.seconds[name] += took if name == "communication" else took - (self.seconds["communication"] - before)


@contextlib.contextmanager
def timed_collectives(clock: Clock) -> Iterator[None]:
    """Count the time inside torch.distributed's collectives as communication."""
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def timed(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with clock.part("communication"):
                return original(*args, **kwargs)

        return call

    try:
        for name, original in originals.items():
            setattr(dist, name, timed(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


Step = Callable[[Clock], float]  # runs one step, returns its loss


@dataclass
class Measured:
    """What interleaved rounds of one kind of step gave: seconds of each, of each part by median, and losses."""

    steps_s: list[float]
    parts_s: dict[str, float]
    losses: list[float]

    @property
    def step_s(self) -> float:
        """Seconds of a step, by median."""
        return statistics.median(self.steps_s)

    def as_dict(self, views: int) -> dict[str, Any]:
        parts = {name: round(1000 * value, 3) for name, value in self.parts_s.items()}
        return {
            "views_per_s": round(views / self.step_s, 2),
            "step_ms": round(1000 * self.step_s, 2),
            "parts_ms": parts,
        }


def interleaved(steps: dict[str, Step], device: torch.device, *, rounds: int) -> dict[str, Measured]:
    """Medians over `rounds` of all kinds in turn, after one step of each to warm up."""
    clocks: dict[str, list[Clock]] = {name: [] for name in steps}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            clock = Clock(device)
            with timed_collectives(clock):
                losses[name].append(step(clock))
            if turn:
                clocks[name].append(clock)
    return {name: _median(clocks[name], losses[name]) for name in steps}


def _median(clocks: list[Clock], losses: list[float]) -> Measured:
    parts = {name: statistics.median(clock.seconds[name] for clock in clocks) for name in PARTS}
    return Measured([sum(clock.seconds.values()) for clock in clocks], parts, losses)


def beside_peaks(step: Step, device: torch.device, dtype: torch.dtype, peaks: list[float]) -> Step:
    """The step between two measurements of the peak, outside its clock; their mean goes to `peaks`."""

    def measured(clock: Clock) -> float:
        before = peak_flops(device, dtype)
        loss = step(clock)
        peaks.append((before + peak_flops(device, dtype)) / 2)
        return loss

    return measured


def peak_flops(device: torch.device, dtype: torch.dtype, *, repeats: int = 5) -> float:
    """FLOP/s of a large square product: the best of a few."""
    size = PEAK_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    clock, best = Clock(device), float("inf")
    for _ in range(repeats + 1):
        start = clock.now()
        torch.mm(a, b)
        best = min(best, clock.now() - start)
    return 2 * size**3 / best


def flops_per_view(module: nn.Module, *inputs: Tensor | None) -> int:
    """Products of one forward of inputs with a batch of 1; three times that is a training step's."""
    device = next(module.parameters()).device
    given = [None if tensor is None else tensor.to(device) for tensor in inputs]
    # The fused attention of CPUs is unknown to the counter: attention runs as products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(*given)
    return counter.get_total_flops()


def peak_bytes(step: Step, device: torch.device) -> int:
    """Most bytes of tensors alive at once during a step beyond those alive before it, as torch's allocators see it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step(Clock(device))
        return torch.cuda.max_memory_allocated(device) - before
    blocks.kept.clear()  # counted as well
    with quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step(Clock(device))
    assert recorded.profiler is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most
