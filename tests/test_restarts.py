"""Who comes back after which end: the rule shared by this machine and SLURM."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from cluster import restarts, slurm
from cluster.restarts import decide, stuck
from cluster.submission import Record, Submission, append_line, new_submission, read_lines
from configs import UserError


@pytest.fixture
def submission(tmp_path: Path) -> Submission:
    made = new_submission(tmp_path, "pretrain")
    made.write_record(Record("pretrain", "pretrain", "slurm", "77", "host", 0.0, 0.0, "code", 1, 2, 2))
    return made


def end(submission: Submission, life: int = 0, *, preempted: bool = False) -> str:
    generation = submission.generation(life)
    return decide(submission, generation, "rank 1 was killed", preempted=preempted, max_restarts=2).action


def save(submission: Submission, step: int) -> None:
    (submission.home / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)


def test_failures_without_progress_are_bounded(submission: Submission) -> None:
    assert [end(submission) for _ in range(3)] == ["restart", "restart", "failed"]


def test_progress_starts_the_count_anew(submission: Submission) -> None:
    for step in (10, 20, 30, 40, 50):
        assert end(submission) == "restart"
        save(submission, step)
    assert [end(submission) for _ in range(3)] == ["restart", "restart", "failed"]


def test_a_save_on_request_is_no_failure(submission: Submission) -> None:
    assert {end(submission, preempted=True) for _ in range(10)} == {"restart"}
    assert submission.failures() == []


def test_what_is_over_stays_over(submission: Submission) -> None:
    submission.write_outcome("finished")
    assert end(submission) == "over"
    submission.write_outcome("failed", "too late")
    outcome = submission.outcome()
    assert outcome is not None
    assert outcome.status == "finished"


def test_a_cancelled_job_does_not_come_back(submission: Submission) -> None:
    submission.cancel_file.touch()
    assert end(submission, preempted=True) == "over"


def test_an_older_life_decides_nothing(submission: Submission) -> None:
    submission.add_life(submission.generation(1))
    assert end(submission, life=0) == "fenced"
    assert submission.failures() == []


def test_generations_rise_over_submissions(tmp_path: Path) -> None:
    first, second = new_submission(tmp_path, "pretrain"), new_submission(tmp_path, "pretrain")
    assert first.generation(99) < second.generation(0)


def test_stuck_counts_the_last_failures_at_the_same_progress() -> None:
    assert stuck([]) == 0
    assert stuck([{"progress": p} for p in (0, 10, 10, 10)]) == 3


@pytest.mark.parametrize(
    ("arguments", "known", "requeued"),
    [
        (["137"], ("RUNNING", "None", 0), True),  # a rank was killed
        (["85"], ("RUNNING", "None", 0), True),  # saved on request
        (["137"], ("RUNNING", "None", 1), False),  # SLURM was faster
        (["143", "--terminated"], ("COMPLETING", "TimeLimit", 0), True),
        (["143", "--terminated"], ("COMPLETING", "None", 0), False),  # scancel
        (["85"], ("COMPLETING", "None", 0), False),  # scancel, and the ranks took it for a request to save
        (["137"], ("NODE_FAIL", "NodeDown", 0), False),  # SLURM brings it back
    ],
)
def test_the_batch_scripts_last_lines(
    submission: Submission,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    known: tuple[str, str, int],
    requeued: bool,
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(slurm, "facts_of", lambda job_id: slurm.JobFacts(*known))
    monkeypatch.setattr(slurm, "requeue", asked.append)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    assert restarts.main([str(submission.folder), *arguments]) == int(arguments[0])
    assert asked == (["77"] if requeued else [])
    assert submission.outcome() is None


def test_a_controller_that_is_away_is_waited_for(submission: Submission, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(job_id: str) -> slurm.JobFacts:
        asked.append(job_id)
        if len(asked) < 3:
            raise UserError("Unable to contact slurm controller")
        return slurm.JobFacts("RUNNING", "None", 0)

    requeued: list[str] = []
    monkeypatch.setattr(slurm, "facts_of", answer)
    monkeypatch.setattr(slurm, "requeue", requeued.append)
    monkeypatch.setattr(restarts, "_TRY_AGAIN_S", 0)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    restarts.main([str(submission.folder), "137"])
    assert (len(asked), requeued) == (3, ["77"])
    monkeypatch.setattr(restarts, "_PATIENCE_S", -1)
    asked.clear()
    with pytest.raises(UserError, match="Unable to contact"):
        restarts.main([str(submission.folder), "137"])


@pytest.mark.parametrize(
    ("known", "requeued"),
    [
        (("COMPLETING", "JobLaunchFailure", 0), True),  # kill -9 of the batch script, as SLURM 22.05 words it
        (("COMPLETING", "RaisedSignal:9(Killed)", 0), True),
        (("COMPLETING", "JobLaunchFailure", 1), False),  # requeued already
        (("COMPLETING", "None", 0), False),  # scancel
        (("COMPLETING", "TimeLimit", 0), False),  # the script is alive and asks itself
        (("RUNNING", "None", 0), False),
    ],
)
def test_rank_0_takes_the_place_of_a_killed_batch_script(
    submission: Submission, monkeypatch: pytest.MonkeyPatch, known: tuple[str, str, int], requeued: bool
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(slurm, "facts_of", lambda job_id: slurm.JobFacts(*known))
    monkeypatch.setattr(slurm, "requeue", asked.append)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    restarts.stand_in(submission, 0)
    assert asked == (["77"] if requeued else [])
    assert len(submission.failures()) == len(asked)


def test_room_on_a_full_disk_is_waited_for(submission: Submission, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    tries = iter((errno.ENOSPC, errno.EDQUOT, None))
    write = Submission.add_failure

    def add_failure(self: Submission, generation: int, exits: str) -> None:
        if (code := next(tries)) is not None:
            raise OSError(code, os.strerror(code))
        write(self, generation, exits)

    monkeypatch.setattr(Submission, "add_failure", add_failure)
    monkeypatch.setattr(slurm, "facts_of", lambda job_id: slurm.JobFacts("RUNNING", "None", 0))
    monkeypatch.setattr(slurm, "requeue", asked.append)
    monkeypatch.setattr(restarts, "_TRY_AGAIN_S", 0)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    restarts.main([str(submission.folder), "137"])
    assert (asked, len(submission.failures())) == (["77"], 1)


def test_a_line_that_a_full_disk_cut_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_line(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": 2, "b"')
    append_line(path, {"a": 3})
    append_line(path, {"a": 4})
    assert read_lines(path) == [{"a": 1}, {"a": 3}, {"a": 4}]


def test_a_task_of_an_array_requeues_only_itself(submission: Submission, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"JOB_ID": "80", "ARRAY_JOB_ID": "77", "ARRAY_TASK_ID": "3"}.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    assert restarts.slurm_job_id() == "77_3"
