"""Stopping together: a signal on one rank ends all ranks after the same step."""

from __future__ import annotations

import os
import resource
import signal
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from configs.errors import UserError
from pretrain import distributed, preemption
from pretrain.distributed import Ranks
from pretrain.preemption import EARLY_REQUEST, Stop
from tests.standin import run_ranks


def stopped_after(number: int) -> int:
    """Steps that this rank did; rank 1 is told to stop after its fourth, the ranks run at different speeds."""
    ranks = distributed.join(60)
    with Stop(ranks) as stop:
        for step in range(1, 100):
            time.sleep(0.005 * (1 + ranks.rank))
            if (step, ranks.rank) == (4, 1):
                os.kill(os.getpid(), number)
            if stop.agreed():
                return step
    return 0


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_all_ranks_stop_after_the_same_step(number: int, tmp_path: Path) -> None:
    assert run_ranks(3, stopped_after, tmp_path, number) == [5, 5, 5]


def stopped_among_many() -> int:
    """The same where a message takes three steps to pass all ranks; rank 1 is told to stop after its fourth."""
    preemption.RANKS_IN_STEP = 1
    return stopped_after(signal.SIGUSR2)


def test_many_ranks_stop_after_the_same_step_some_steps_later(tmp_path: Path) -> None:
    assert run_ranks(3, stopped_among_many, tmp_path) == [9, 9, 9]


def test_request_from_before_the_handler_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Ranks(0, 1, 0, torch.device("cpu"))
    assert not Stop(alone).agreed()
    monkeypatch.setenv(EARLY_REQUEST, "1")
    assert Stop(alone).agreed()


def test_the_handler_that_was_there_hears_of_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    alone = Ranks(0, 1, 0, torch.device("cpu"))
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with Stop(alone) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.agreed()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


def messages() -> list[object]:
    """What the ranks tell one another."""
    ranks = distributed.join(60)
    said = distributed.broadcast_json({"a": [1, "x"]} if ranks.first else None, ranks)
    gathered = distributed.gather_int64(torch.tensor([ranks.rank, 7]), ranks).tolist()
    mean = float(distributed.mean_over_ranks(torch.tensor(float(ranks.rank)), ranks))
    distributed.barrier(ranks)
    return [said, gathered, mean]


def test_messages(tmp_path: Path) -> None:
    expected = [{"a": [1, "x"]}, [0, 7, 1, 7, 2, 7], 1.0]
    assert run_ranks(3, messages, tmp_path) == [expected] * 3


def waited_for() -> int:
    """Signs of life of a rank while it waits for the last one, for longer than messages may take."""
    ranks, signs = distributed.join(60), list[int]()
    ranks = replace(ranks, messages=dist.new_group(backend="gloo", timeout=timedelta(seconds=0.3)))
    time.sleep(float(ranks.rank == 1))
    distributed.barrier(ranks, alive=lambda: signs.append(1))
    return len(signs)


def test_ranks_that_wait_show_that_they_live(tmp_path: Path) -> None:
    assert run_ranks(2, waited_for, tmp_path)[0] > 2


def allowed_files() -> list[int]:
    """The limit of open files before and after joining."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    distributed.join(60)
    return list(resource.getrlimit(resource.RLIMIT_NOFILE))


def test_joining_makes_room_for_the_connections_to_a_thousand_ranks(tmp_path: Path) -> None:
    ((allowed, most),) = run_ranks(1, allowed_files, tmp_path)
    assert allowed >= min(most, 4 * 1024)


@pytest.mark.parametrize(("visible", "device"), [(1, 0), (4, 3)])
def test_deepspeed_is_told_the_device_among_those_that_are_visible(
    visible: int, device: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM may show each process of a node only a GPU of its own, which is then number 0."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert distributed.own_device() == distributed.own_device("cuda") == torch.device("cuda", device)
    assert chosen == [torch.device("cuda", device)] * 2
    assert distributed.own_device("cpu") == torch.device("cpu")
    assert os.environ["LOCAL_RANK"] == str(device)  # what DeepSpeed sets as the current device


@pytest.mark.parametrize("wanted", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there_is_named(wanted: str) -> None:
    with pytest.raises(UserError, match=f"device={wanted} cannot be used here"):
        distributed.own_device(wanted)


def test_batch_that_does_not_divide_names_what_works() -> None:
    distributed.check_divides(12, 4)
    with pytest.raises(ValueError, match=r"12 does not divide among 5 processes; use 1, 2, 3, 4, 6 processes"):
        distributed.check_divides(12, 5)
