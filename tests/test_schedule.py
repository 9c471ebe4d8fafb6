"""Learning rate and length of a run against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from pretrain.schedule import due, learning_rate_at, warmup_steps
from tests.standin_run import settings


def test_warm_up_is_a_straight_line_to_the_peak() -> None:
    rates = [learning_rate_at(step, steps=100, peak=1.0, warmup=4) for step in range(7)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0])


def test_cosine_starts_at_the_peak_and_ends_at_its_share() -> None:
    def rate(step: int) -> float:
        return learning_rate_at(step, steps=110, peak=2.0, name="cosine", warmup=10, final=0.1)

    assert rate(10) == 2.0
    assert rate(60) == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert rate(110) == pytest.approx(0.2)
    assert rate(35) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))))
    assert all(rate(step) > rate(step + 1) > 0.2 for step in range(10, 109))


def test_extended_run_stays_at_the_end() -> None:
    assert learning_rate_at(500, steps=100, peak=1.0, name="cosine", final=0.5) == pytest.approx(0.5)


def test_warm_up_in_epochs() -> None:
    assert warmup_steps(settings(schedule={"warmup_steps": 0, "warmup_epochs": 2.0}).schedule, 16, 64) == 8
    assert warmup_steps(settings(schedule={"warmup_steps": 3}).schedule, 16, 64) == 3


def test_due() -> None:
    assert [step for step in range(10) if due(step, 3)] == [3, 6, 9]
    assert not any(due(step, None) for step in range(10))
