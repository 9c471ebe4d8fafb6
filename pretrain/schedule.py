"""How the learning rate moves over a run: pure functions of the step.

Owns: the warm-up, the cosine and the predicate of everything that happens now and then.
Steps count from 0; `learning_rate_at(0)` is used by the first update.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from configs.schema import PretrainConfig, Schedule


def due(step: int, every: int | None) -> bool:
    """True when a thing done every so many steps is to be done after `step` steps are complete."""
    return every is not None and step > 0 and step % every == 0


def warmup_steps(schedule: Schedule, batch_size: int, num_samples: int) -> int:
    """Steps of linear warm-up, whether they are given in steps or in epochs."""
    return schedule.warmup_steps or round(schedule.warmup_epochs * num_samples / batch_size)


def learning_rate_at(
    step: int, *, steps: int, peak: float, name: str = "constant", warmup: int = 0, final: float = 0.0
) -> float:
    """Learning rate of the update that follows `step` complete ones.

    Linear from peak / (warmup + 1) over the first `warmup` steps; then `peak`, or a cosine that would reach
    `final * peak` one step after the last, so that no step is wasted. A warm-up longer than the run never ends.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if name == "constant":
        return peak
    assert name == "cosine", name
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_schedule(config: PretrainConfig, num_samples: int) -> Callable[[int], float]:
    """Return the learning rate as a function of the step for a run over `num_samples` images."""
    steps = config.num_steps(num_samples)
    warmup = warmup_steps(config.schedule, config.batch_size, num_samples)

    def at(step: int) -> float:
        return learning_rate_at(
            step,
            steps=steps,
            peak=config.optimizer.lr,
            name=config.schedule.name,
            warmup=warmup,
            final=config.schedule.final,
        )

    return at
