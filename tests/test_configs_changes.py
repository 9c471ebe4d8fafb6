"""Which keys a resumed run may change, and what a refusal says."""

from __future__ import annotations

import pytest

from configs import PretrainConfig, UserError, load
from configs.changes import changes, check_resume


def config(*overrides: str) -> PretrainConfig:
    loaded = load("quickstart.yaml", overrides)
    assert isinstance(loaded, PretrainConfig)
    return loaded


def test_what_is_computed_differently_may_change() -> None:
    overrides = ["compute.micro_batch=8", "cluster.nodes=3", "steps=2000", "checkpoints.keep_last=5", "downstream=[]"]
    found = check_resume(config(), config(*overrides), "runs/q")
    assert {change.key.partition(".")[0] for change in found} == {
        "compute",
        "cluster",
        "steps",
        "checkpoints",
        "downstream",
    }
    assert all(change.allowed for change in found)


def test_run_and_data_may_have_moved() -> None:
    found = check_resume(config(), config("data.shards=/elsewhere/train", "name=other"), "runs/q")
    assert [(change.key, change.new) for change in found] == [("name", "other"), ("data.shards", "/elsewhere/train")]


def test_more_broken_samples_may_be_put_up_with() -> None:
    """What the run advises when it stops for them."""
    assert [change.key for change in check_resume(config(), config("data.max_broken=0.05"), "r")] == ["data.max_broken"]


def test_changed_jobs_are_told_by_name_or_by_what_differs_in_them() -> None:
    none, probe = config("downstream=[]"), config("downstream=[{job: linear_probe, train: a, data: b}]")
    other = config("downstream=[{job: linear_probe, train: a, data: b, images: 9}]")
    assert [str(change) for change in changes(none, probe)] == ["downstream: [] -> [linear_probe]"]
    assert [str(change) for change in changes(probe, other)] == ["downstream.0.images: None -> 9"]


@pytest.mark.parametrize(
    "override",
    ["batch_size=64", "seed=1", "optimizer.lr=0.5", "model.args.num_steps=4", "data.window=3", "task.temperature=0.2"],
)
def test_what_is_computed_may_not(override: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(UserError, match=rf"(?s){key}: .*init_from=runs/q") as caught:
        check_resume(config(), config(override), "runs/q")
    assert "name=" in str(caught.value)


def test_nothing_changed() -> None:
    assert changes(config(), config()) == []


def test_another_task_is_named_as_a_whole() -> None:
    with pytest.raises(UserError, match="task"):
        check_resume(config(), config("task={name: classify, num_classes: 3}"), "runs/q")
