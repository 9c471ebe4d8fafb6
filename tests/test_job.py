"""What a node runs: the place of a rank, imports without the garbage collector."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest

from cluster.job import imported, place


@pytest.fixture
def collections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two modules that make many objects, the second of them broken; returns the phases of collections seen."""
    many = "things = [[] for _ in range(100_000)]\n"
    (tmp_path / "many_objects.py").write_text(many)
    (tmp_path / "many_and_broken.py").write_text(many + "raise ValueError('broken')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen: list[str] = []
    monkeypatch.setattr(gc, "callbacks", [*gc.callbacks, lambda phase, _: seen.append(phase)])
    return seen


def test_nothing_is_collected_while_importing_and_what_came_is_left_alone_later(collections: list[str]) -> None:
    before = gc.get_freeze_count()
    module = imported("many_objects")
    assert collections == []
    assert len(module.things) == 100_000
    assert gc.get_freeze_count() >= before + 100_000
    assert gc.isenabled()
    sys.modules.pop("many_objects")


def test_a_broken_module_leaves_the_collector_on(collections: list[str]) -> None:
    with pytest.raises(ValueError, match="broken"):
        imported("many_and_broken")
    assert gc.isenabled()


@pytest.mark.parametrize(("given", "cores"), [({"SLURM_CPUS_PER_TASK": "12"}, 12), ({}, None)])
def test_cores_that_slurm_gives_a_rank_are_its_own(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], cores: int | None
) -> None:
    slurm = {"JOB_ID": "7", "NTASKS": "16", "JOB_NUM_NODES": "2", "NODEID": "1", "PROCID": "9", "LOCALID": "1"}
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    for name, value in ({f"SLURM_{key}": value for key, value in slurm.items()} | given).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    here = place()
    assert (here.rank, here.local_rank, here.processes, here.address, here.cores) == (9, 1, 8, "n1", cores)
