"""The average of the weights against a plain recursion."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from configs.schema import Ema as EmaConfig
from pretrain.ema import Ema, decay_at, largest_decay


class Weights:
    """What the average asks of an engine below ZeRO stage 3 (stage 3: tests/test_engine.py)."""

    def __init__(self) -> None:
        self.value = {"w": torch.zeros(3)}

    def shards(self) -> dict[str, Tensor]:
        return self.value

    def assemble(self, shards: dict[str, Tensor]) -> dict[str, Tensor]:
        return shards

    def weights(self) -> dict[str, Tensor]:
        return {**self.value, "buffer": torch.tensor([7.0])}

    def shard(self, name: str, whole: Tensor) -> Tensor:
        return whole


def test_ramp() -> None:
    assert decay_at(0, 0.998) == 0.0
    assert decay_at(7, 0.998) == pytest.approx(1 - 8 ** (-2 / 3)) == pytest.approx(0.75)
    assert decay_at(10**6, 0.998) == 0.998


def test_average_equals_a_plain_recursion() -> None:
    engine: Any = Weights()
    ema = Ema(engine, EmaConfig(decay=0.7, every=3, start=6), 100)
    expected, updates = 0.0, 0
    for step in range(1, 40):
        engine.value["w"].fill_(float(step))
        ema.update(step)
        if step > 6 and step % 3 == 0:
            decay = min(0.7, 1 - (1 + updates) ** (-2 / 3))
            expected = decay * expected + (1 - decay) * step
            updates += 1
        torch.testing.assert_close(ema.weights()["w"], torch.full((3,), expected if updates else float(step)))
    assert ema.updates == updates
    assert ema.weights()["buffer"] == 7.0


def test_loaded_average_goes_on_bitwise() -> None:
    engine: Any = Weights()
    whole, first = (Ema(engine, EmaConfig(decay=0.9, every=1, start=0), 100) for _ in range(2))
    for step in range(1, 20):
        engine.value["w"] = torch.randn(3)
        whole.update(step)
        if step == 10:
            first = Ema(engine, EmaConfig(decay=0.9, every=1, start=0), 100)
            first.load({name: t.clone() for name, t in whole.weights().items()}, whole.updates)
        elif step > 10:
            first.update(step)
    assert torch.equal(first.weights()["w"], whole.weights()["w"])


def test_no_averaging_at_decay_0() -> None:
    engine: Any = Weights()
    ema = Ema(engine, EmaConfig(decay=0.0, every=1, start=0), 100)
    ema.update(1)
    engine.value["w"].fill_(5.0)
    assert ema.updates == 0
    assert ema.weights()["w"].tolist() == [5.0] * 3


def test_horizon_is_a_share_of_the_run() -> None:
    config = EmaConfig(every=10, horizon=0.05)
    assert largest_decay(config, 10_000) == pytest.approx(1 - 10 / 500)
    assert largest_decay(config, 100) == 0.0
