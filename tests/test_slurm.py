"""Reading SLURM's output. The texts are those of a real SLURM 22.05."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import slurm
from configs import UserError


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of stand-ins for SLURM's commands, first on PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    slurm.available.cache_clear()
    slurm._nodes.cache_clear()


def put(folder: Path, name: str, output: str, code: int = 0) -> None:
    (folder / name).write_text(f"#!/bin/sh\ncat <<'E'\n{output}\nE\nexit {code}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("infinite", None), ("30:00", 30), ("1:30:00", 90), ("2-12:00:00", 3600), ("1-00:00:00", 1440)],
)
def test_time_limits(text: str, minutes: int | None) -> None:
    assert slurm.minutes(text) == minutes


def test_gpus_by_type() -> None:
    assert slurm.gpus_of("gpu:8") == {"": 8}
    assert slurm.gpus_of("gpu:a100:4(S:0-1),gpu:2,nvme:1") == {"a100": 4, "": 2}
    assert slurm.gpus_of("(null)") == {}


def test_the_queue_knows_better_than_accounting(command: Path) -> None:
    put(command, "sacct", "6|PREEMPTED|n1\n7|NODE_FAIL|n[1-2]\n8|CANCELLED by 0|n1\n9|COMPLETED|n1")
    put(command, "squeue", "7|7_N/A|PENDING|BeginTime|")
    found = slurm.queue(["6", "7", "8", "9"])
    assert found["6"].state == "PREEMPTED and has it no longer in the queue"  # for good (PreemptMode=CANCEL)
    assert found["7"] == slurm.QueueEntry("PENDING", "BeginTime", "")
    assert found["8"].state == "CANCELLED"
    assert found["9"].state == "COMPLETED"


def test_tasks_of_arrays(command: Path) -> None:
    put(command, "sacct", "")
    put(command, "squeue", "12|12_0|RUNNING|None|n1\n13|12_1|PENDING|Resources|")
    found = slurm.queue(["12_0", "12_1"])
    assert found["12_0"] == slurm.QueueEntry("RUNNING", "", "n1")
    assert found["12_1"].state == "PENDING"


def test_partitions_are_merged_over_kinds_of_nodes(command: Path) -> None:
    put(
        command,
        "sinfo",
        "a*|up|1-00:00:00|4|64|500000+|gpu:a100:4\na*|up|1-00:00:00|2|128|1000000|gpu:h100:8\nb|up|infinite|1|8|9|(null)",
    )
    (part,) = slurm.partitions()
    assert part == slurm.Partition("a", True, 1440, 6, 128, 1000000, {"a100": 4, "h100": 8})
    assert slurm.partitions("nowhere") == []


def test_a_failing_command_is_the_users_error_with_its_message(command: Path) -> None:
    put(command, "scancel", "")
    (command / "scancel").write_text("#!/bin/sh\necho Invalid job id >&2\nexit 1\n")
    with pytest.raises(UserError, match="Invalid job id"):
        slurm.cancel(["5"])


def test_slurm_is_not_there_without_a_configuration(command: Path) -> None:
    put(command, "sbatch", "")
    put(command, "scontrol", "", 1)
    assert not slurm.available()
    forget()
    put(command, "scontrol", "Slurmctld(primary) at ctl is UP")
    assert slurm.available()
    forget()
    put(command, "scontrol", "Slurmctld(primary) at ctl is DOWN", 1)
    with pytest.raises(UserError, match="does not answer"):
        slurm.available()
