"""The launcher at the prompt: errors, dry run, and that it needs no torch. No job is started here."""

from __future__ import annotations

import json
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import configs
from cluster import chain, executor, launch, launching, slurm, sweep
from cluster.job import Job
from cluster.submission import Record, hold, new_submission
from configs import LinearProbeConfig, UserError

LAUNCH = Path(__file__).resolve().parents[1] / "cluster" / "launch.py"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.tar").touch()
    (tmp_path / "shards" / "index.json").write_text(json.dumps({"samples": 100}))
    (tmp_path / "run.yaml").write_text(
        "name: r\nbatch_size: 8\nepochs: 3\nmodel: {name: akorn_nano_patch4_32}\ndata: {shards: shards}\n"
        "views: {size: 32}\ncluster: {executor: local, processes: 2, gpus: 0}\n"
    )
    return tmp_path


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_dry_run_shows_all_and_changes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(place)
    assert launch.main(["run.yaml", "optimizer.lr=0.5", "--dry-run"]) == 0
    assert contents(place) == before
    said = capsys.readouterr().out
    assert "lr: 0.5" in said
    assert "8 = 2 x 4" in said
    assert "38 = 3 epochs" in said  # 3 * 100 / 8 = 37.5 steps
    assert "would submit: pretrain" in said


def test_a_dry_run_without_data_shows_the_plan_all_the_same(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no shards at nowhere"):
        launch.main(["run.yaml", "data.shards=nowhere", "--dry-run"])
    said = capsys.readouterr().out
    assert "nowhere (samples counted when the job starts)" in said
    assert "would submit: nothing: see the errors" in said


def test_missing_shards_name_the_path_and_the_command() -> None:
    """Two lines in less than a second, from a folder without data, through the real entry point."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, str(LAUNCH), "quickstart.yaml", "data.shards=nowhere/tetrominoes"],
        capture_output=True,
        text=True,
        cwd="/",
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 2
    assert "no shards at nowhere/tetrominoes" in lines[0]
    assert "make_shards.py tetrominoes nowhere/tetrominoes" in lines[1]
    assert after.ru_utime - before.ru_utime < 1  # processor time: a busy machine takes longer


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch_size=9", r"batch_size=9 does not divide over 2 processes; use 1, 3, 9 processes, or batch_size=8"),
        ("cluster={executor: local, nodes: 2, gpus: 64}", r"needs SLURM, .*: cluster\.nodes=1 cluster\.gpus=\d+$"),
        ("cluster.gpus=64", r"this machine shows \d+"),
        ("optimzer.lr=1", r"did you mean 'optimizer'"),
        ("data.shards=shard", r"no shards at shard"),
    ],
)
def test_errors_name_the_remedy(place: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        launch.main(["run.yaml", override])
    assert not (place / "runs").exists()


def test_an_evaluation_needs_a_backbone(place: Path) -> None:
    (place / "probe.yaml").write_text("job: linear_probe\n")
    with pytest.raises(UserError, match="which backbone"):
        launch.main(["probe.yaml"])
    with pytest.raises(UserError, match="ckpt: nothing at"):
        launch.main(["probe.yaml", "ckpt=./nowhere.pth"])
    with pytest.raises(UserError, match=r"downstream\.0\.also: nothing at"):
        launch.main(["run.yaml", "downstream=[{job: object_discovery, data: shards, also: [./nowhere.pth]}]"])
    with pytest.raises(UserError, match="ckpt: nothing at runs/nowhere"):
        launch.main(["probe.yaml", "ckpt=runs/nowhere"])
    with pytest.raises(UserError, match=r"data: is not given, and linear_probe needs it \(missing as well: train\)"):
        launch.main(["probe.yaml", "ckpt=resnet50"])
    with pytest.raises(UserError, match=r"downstream\.0\.preset: is not given, and object_discovery needs it"):
        launch.main(["run.yaml", "downstream=[{job: object_discovery, data: shards}]"])
    with pytest.raises(UserError, match="cifar10c: no folder arrays"):
        launch.main(["robustness.yaml", "ckpt=resnet50", "data=shards", "cifar10c=arrays"])


def test_commands_on_unknown_runs(place: Path) -> None:
    (place / "runs" / "abcdef" / "jobs").mkdir(parents=True)
    with pytest.raises(UserError, match="did you mean 'abcdef'"):
        launch.main(["status", "abcdeg"])
    with pytest.raises(UserError, match="no runs"):
        launch.main(["list", "--runs-dir", "elsewhere"])


def test_the_launcher_imports_no_torch(place: Path) -> None:
    code = (
        "import sys; sys.argv[0] = 'x'\n"
        f"sys.path.insert(0, {str(LAUNCH.parents[1])!r})\n"
        "from cluster import launch\n"
        "launch.main(['run.yaml', '--dry-run'])\n"
        "assert not {'torch', 'numpy', 'timm'} & set(sys.modules), sorted(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_script_for_slurm_can_be_seen_without_slurm(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = ["cluster.executor=slurm", "cluster.nodes=4", "cluster.gpus=8", "cluster.processes=null"]
    more = ["cluster.partition=gpu", "cluster.gpu_type=h100", "cluster.cpus_per_process=12", "batch_size=64"]
    with pytest.raises(UserError, match=r"sinfo|partition"):  # said at the end, after everything that can be shown
        launch.main(["run.yaml", *cluster, *more, "--dry-run"])
    said = capsys.readouterr().out
    for line in ("--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=h100:8", "--partition=gpu", "--requeue"):
        assert f"#SBATCH {line}" in said
    assert "--cpus-per-task=12" in said
    assert "64 = 32 x 2" in said


@pytest.mark.parametrize(
    ("keys", "lines"),
    [
        ("account=me", ["#SBATCH --account=me"]),
        ("qos=normal", ["#SBATCH --qos=normal"]),
        ("constraint=a&b", ["#SBATCH --constraint='a&b'"]),
        ("exclude=n[3-4]", ["#SBATCH --exclude='n[3-4]'"]),
        ("memory_gb=32", ["#SBATCH --mem=32GB"]),
        ("time_min=300 signal_s=90", ["#SBATCH --time=300", "#SBATCH --signal=USR2@90"]),
        ("sbatch_args={comment:hi}", ["#SBATCH --comment=hi"]),
        ("sbatch_args={exclusive:true,nice:1}", ["#SBATCH --exclusive\n", "#SBATCH --nice=1"]),
        ("srun_args=[--container-image=a]", [" --kill-on-bad-exit=1 --container-image=a "]),
        ("setup=[source]", ["trap : USR2\n    source\n    export "]),
        ("interface=ib0", ["export NCCL_SOCKET_IFNAME=ib0", "export GLOO_SOCKET_IFNAME=ib0"]),
        ("env={A:x}", ['export A=x\n    export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-$OMP_NUM_THREADS}"\n    \n']),
        ("env={OMP_NUM_THREADS:'3'}", ["export OMP_NUM_THREADS=3\n"]),
    ],
)
def test_each_resource_reaches_the_script(
    place: Path, capsys: pytest.CaptureFixture[str], keys: str, lines: list[str]
) -> None:
    given = [f"cluster.{key.replace(':', ': ')}" for key in f"executor=slurm partition=p {keys}".split()]
    with pytest.raises(UserError, match=r"sinfo|partition"):
        launch.main(["run.yaml", *given, "--dry-run"])
    said = capsys.readouterr().out
    for line in lines:
        assert line in said
    if "OMP" in keys:
        assert "SLURM_CPUS_PER_TASK" not in said  # the user has the last word


def test_sweeps_make_a_run_for_each_combination(place: Path) -> None:
    runs = sweep.configurations("run.yaml", ["seed=1"], ["optimizer.lr=1e-3,3e-4", "batch_size=8,16"])
    assert [run.name for run in runs] == [
        "r_lr-1e-3_batch_size-8",
        "r_lr-1e-3_batch_size-16",
        "r_lr-3e-4_batch_size-8",
        "r_lr-3e-4_batch_size-16",
    ]
    assert {(run.optimizer.lr, run.batch_size, run.seed) for run in runs} == {
        (1e-3, 8, 1),
        (1e-3, 16, 1),
        (3e-4, 8, 1),
        (3e-4, 16, 1),
    }
    with pytest.raises(UserError, match="expected key=value"):
        sweep.combinations(["optimizer.lr"])


def test_commas_in_brackets_separate_no_values() -> None:
    swept = sweep.combinations(["model.args={coupling: none},{n: 2, num_steps: [4, 4]}", "seed=0,1"])
    assert [model for model, seed in swept if seed == "seed=1"] == [
        "model.args={coupling: none}",
        "model.args={n: 2, num_steps: [4, 4]}",
    ]


def test_runs_of_a_sweep_over_models_are_named_by_what_differs(place: Path) -> None:
    models = "model={name: itrsa_nano_patch4_32},{name: akorn_nano_patch4_32, args: {coupling: none, n: 2}}"
    runs = sweep.configurations("run.yaml", [], [models, "seed=0,1"])
    assert [run.name for run in runs if run.seed == 1] == [
        "r_itrsa_nano_patch4_32_seed-1",
        "r_akorn_nano_patch4_32_coupling-none_n-2_seed-1",
    ]
    assert sweep.name_of("r", ["views.jitter=[0.8, 0.5]", "seed=1"]) == "r_jitter-0.8-0.5_seed-1"
    with pytest.raises(UserError, match="not valid YAML"):
        sweep.configurations("run.yaml", [], ["model={name: }}"])
    with pytest.raises(UserError, match="2 runs would be called r_lr-1e-3"):
        sweep.configurations("run.yaml", [], ["optimizer.lr=1e-3,1e-3"])


def test_a_sweep_on_slurm_is_one_array_with_its_evaluations_behind(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted: list[tuple[int, str]] = []
    scripts: list[str] = []

    def submit(jobs: Sequence[Job], folder: Path, parameters: Mapping[str, Any]) -> list[str]:
        submitted.append((len(jobs), parameters["additional_parameters"].get("dependency", "")))
        scripts.append(executor.batch_script(parameters, folder))
        return [f"7_{number}" for number in range(len(jobs))] if len(jobs) > 1 else [f"{70 + len(submitted)}"]

    monkeypatch.setattr(executor, "submit_slurm", submit)
    monkeypatch.setattr(slurm, "partitions", lambda name: [slurm.Partition("a", True, None, 4, 64, 256_000, {})])
    downstream = "downstream=[{job: object_discovery, preset: voc, data: shards}]"
    sweep_lr = ["--sweep", "optimizer.lr=1e-3,3e-4"]
    assert launch.main(["run.yaml", "cluster.executor=slurm", downstream, *sweep_lr]) == 0
    assert submitted[0] == (2, "")
    assert [after for _, after in submitted[1:]] == ["afterok:7_0", "afterok:7_0,afterany:72"] + [
        "afterok:7_1",
        "afterok:7_1,afterany:74",
    ]
    assert "runs/r_lr-3e-4: SLURM job 7_1 and 2 after it" in capsys.readouterr().out
    assert (place / "runs" / "r_lr-3e-4" / "jobs" / "0000_pretrain" / "submitit").is_symlink()
    (code,) = set(re.findall(r"PYTHONPATH='?([^:'\n]+)", scripts[0]))  # no run's own: any may be removed
    assert Path(code).parent == place / "runs" / ".sweeps" / "code"
    assert (Path(code) / "cluster" / "restarts.py").is_file()
    # A third value makes a new run; of the others one is queued, and one SLURM does not know any more.
    monkeypatch.setattr(slurm, "queue", lambda ids: {"7_0": slurm.QueueEntry("PENDING", "", "")})
    sweep_lr = ["--sweep", "optimizer.lr=1e-3,3e-4,1e-4"]
    assert launch.main(["run.yaml", "cluster.executor=slurm", *sweep_lr, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "runs/r_lr-1e-3: is under way\n" in said
    assert "runs/r_lr-3e-4: goes on with pretrain\n" in said
    assert "runs/r_lr-1e-4: new: pretrain\n" in said
    submitted.clear()
    assert launch.main(["run.yaml", "cluster.executor=slurm", *sweep_lr]) == 0
    assert submitted == [(1, ""), (1, "")]
    assert len(list((place / "runs" / "r_lr-3e-4" / "jobs").glob("*_pretrain"))) == 2


def test_a_sweep_over_resources_has_an_array_for_each_and_fetches_weights(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted: list[tuple[int, int]] = []
    fetched: list[str] = []

    def submit(jobs: Sequence[Job], folder: Path, parameters: Mapping[str, Any]) -> list[str]:
        submitted.append((len(jobs), parameters["time"]))
        return [f"{len(submitted)}_{number}" for number in range(len(jobs))]

    monkeypatch.setattr(executor, "submit_slurm", submit)
    monkeypatch.setattr(slurm, "partitions", lambda name: [slurm.Partition("a", True, None, 4, 64, 256_000, {})])
    monkeypatch.setattr(launching, "_fetch", lambda name, runs_dir: fetched.append(name))
    both = ["--sweep", "seed=0,1", "--sweep", "cluster.time_min=10,20"]
    assert launch.main(["run.yaml", "cluster.executor=slurm", *both]) == 0
    assert submitted == [(2, 10), (2, 20)]
    probe = "downstream=[{job: linear_probe, ckpt: vit_tiny, train: shards, data: shards}]"
    assert launch.main(["run.yaml", "name=other", "cluster.executor=slurm", probe, "--sweep", "seed=0,1"]) == 0
    assert set(fetched) == {"vit_tiny"}


def test_weights_are_fetched_for_timm_models_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()

    def fetched(ckpt: str) -> list[str]:
        return launching.pretrained_names(LinearProbeConfig(ckpt=ckpt))

    assert fetched("vit_small_patch14_dinov2.lvd142m") == ["vit_small_patch14_dinov2.lvd142m"]
    assert fetched("hf-hub:timm/resnet18.a1_in1k") == ["hf-hub:timm/resnet18.a1_in1k"]
    for other in ("folder", "local-dir:runs/x/export", "akorn_base_patch16_256", "a/b.pth"):
        assert fetched(other) == []


def test_ctrl_c_while_submitting_says_that_jobs_go_on(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def press(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(chain, "submit", press)
    with pytest.raises(KeyboardInterrupt):
        launching.submit(configs.load("run.yaml"), place / "runs" / "r", [], {}, {})
    assert "end it: python cluster/launch.py cancel r" in capsys.readouterr().out


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written: Not a directory; choose"), hold(tmp_path / "file" / "r"):
        pass


def test_two_launchers_at_once(tmp_path: Path) -> None:
    with hold(tmp_path), pytest.raises(UserError, match="another launch"), hold(tmp_path):
        pass


def test_a_run_that_saved_nothing_may_still_become_another(place: Path) -> None:
    home = place / "runs" / "r"
    home.mkdir(parents=True)
    (home / "config.yaml").write_text((place / "run.yaml").read_text().replace("size: 32", "size: 48"))
    assert [change.key for change in launching.check_folder(configs.load("run.yaml"), home)] == ["views.size"]
    (home / "checkpoints" / "step_00000010").mkdir(parents=True)
    with pytest.raises(UserError, match=r"runs/r was begun with other settings, .*views\.size: 48 -> 32"):
        launching.check_folder(configs.load("run.yaml"), home)


def test_init_from_a_file_that_holds_no_weights(place: Path) -> None:
    with pytest.raises(UserError, match=r"init_from: no weights at run\.yaml; give a run or an export"):
        launch.main(["run.yaml", "init_from=run.yaml"])


def test_a_run_does_not_become_shorter_than_it_is(place: Path) -> None:
    home = place / "runs" / "r"
    (home / "checkpoints" / "step_00000010").mkdir(parents=True)
    (home / "config.yaml").write_text((place / "run.yaml").read_text())
    launching.check_folder(configs.load("run.yaml", ["epochs=null", "steps=10"]), home)
    with pytest.raises(UserError, match="runs/r has trained for 10 steps already and is to have 9"):
        launch.main(["run.yaml", "epochs=null", "steps=9"])


def test_a_finished_run_without_checkpoints_does_not_begin_anew(place: Path) -> None:
    home = place / "runs" / "r"
    (home / "export").mkdir(parents=True)
    (home / "config.yaml").write_text((place / "run.yaml").read_text())
    with pytest.raises(UserError, match=r"no checkpoints to go on from.*\n.*init_from=runs/r/export"):
        launch.main(["run.yaml", "epochs=5"])
    (home / "checkpoints" / "step_00000010").mkdir(parents=True)
    assert launch.main(["run.yaml", "epochs=5", "--dry-run"]) == 0


def test_files_that_a_disk_has_lost_break_no_table(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("record.json", "outcome.json"):
        submission = new_submission(place / "runs" / f"no-{name}", "pretrain")
        here = socket.gethostname()
        submission.write_record(Record("pretrain", "pretrain", "local", "1", here, 0.0, 0.0, "c", 1, 1, 3))
        submission.write_outcome("finished")
        (submission.folder / name).write_text("")
    assert launch.main(["list"]) == 0
    assert capsys.readouterr().out.count("lost") == 2


def test_a_job_that_could_not_be_told_to_end_may_come_back(place: Path) -> None:
    submission = new_submission(place / "runs" / "r", "pretrain")
    submission.write_record(Record("pretrain", "pretrain", "local", "1", "elsewhere", 0.0, 0.0, "c", 1, 1, 3))
    submission.add_life(submission.generation(0))
    for now in ([], ["--now"]):
        with pytest.raises(UserError, match="runs on elsewhere; give the command there"):
            launch.main(["cancel", "r", *now])
        assert not submission.cancel_file.exists()


def test_a_run_goes_by_the_name_of_its_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = place / "other runs" / "two"
    (home / "jobs").mkdir(parents=True)
    (home / "config.yaml").write_text((place / "run.yaml").read_text())
    assert launch.main(["resume", "two", "--runs-dir", "other runs", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "name: two" in said
    assert f"runs_dir: {place}/other runs" in said
    with pytest.raises(UserError, match="other runs/two goes on where it lies"):
        launch.main(["resume", "other runs/two", "name=three"])


def test_what_resume_resumes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.yaml"):
        launching.config_file(tmp_path)
    submission = new_submission(tmp_path, "linear_probe")
    (submission.folder / "config.yaml").touch()
    assert launching.config_file(tmp_path) == submission.folder / "config.yaml"
    (tmp_path / "config.yaml").touch()
    assert launching.config_file(tmp_path) == tmp_path / "config.yaml"
