"""Handing a job to SLURM or to this machine, through submitit in both cases.

Owns: the parameters of the submission, the set-up and last lines of the batch script, and what a SLURM submission would
look like (for --dry-run). Locally submitit's controller is replaced by a supervisor that restarts (supervise.py).
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import environment
from cluster.process import started_at
from cluster.resources import Resources, local_gpus
from cluster.submission import Record, Submission
from configs import UserError
from configs.cluster import Cluster

if TYPE_CHECKING:
    from cluster.job import Job

os.environ.setdefault("SUBMITIT_LOG_LEVEL", "CRITICAL")

# submitit ends a job for good after this many time limits; ours go on for as long as they make progress.
_MANY = 1_000_000
# Options of sbatch that decide whether a job comes back or can be found again.
_OURS = {"requeue", "no_requeue", "signal", "output", "error", "open_mode", "array", "dependency"}


def variables(resources: Resources, code: Path, commit: str) -> dict[str, str]:
    """Environment of the job's processes that must be there before Python starts."""
    cores = resources.cores
    return environment.before_python(
        resources.cluster,
        code=code,
        cores=(1 if cores is None else cores) * resources.processes,
        processes=resources.processes,
        gpus=resources.gpus,
        local=resources.executor == "local",
        commit=commit,
        python_path=os.environ.get("PYTHONPATH", ""),
    )


def slurm_parameters(
    resources: Resources, *, name: str, folders: Sequence[Path], code: Path, exports: Mapping[str, str], after: str
) -> dict[str, Any]:
    """submitit's parameters for a SLURM job.

    Args:
        name: of the job in the queue.
        folders: of the submissions; more than one makes a job array.
        code: the snapshot.
        exports: environment of the processes.
        after: SLURM's dependency expression; empty for none.
    """
    cluster = resources.cluster
    additional: dict[str, Any] = {"requeue": True, **cluster.sbatch_args}
    reserved = _OURS & {key.replace("-", "_") for key in cluster.sbatch_args}
    if reserved:
        raise UserError(f"cluster.sbatch_args: {', '.join(sorted(reserved))} is set by the launcher; remove it")
    if after:
        additional |= {"dependency": after, "kill-on-invalid-dep": "yes"}
    srun_args = ["--kill-on-bad-exit=1", *cluster.srun_args]
    parameters: dict[str, Any] = {
        "job_name": name,
        "nodes": resources.nodes,
        "ntasks_per_node": resources.processes,
        "cpus_per_task": resources.cores,
        "time": cluster.time_min,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "exclude": cluster.exclude,
        "mem": None if cluster.memory_gb is None else f"{cluster.memory_gb}GB",
        "signal_delay_s": cluster.signal_s,
        "stderr_to_stdout": True,
        "wckey": None,
        "additional_parameters": additional,
        "srun_args": srun_args,
        "setup": _setup_lines(cluster, exports),
        "teardown": _last_lines(folders, code),
    }
    if resources.cores is not None:
        # Since SLURM 22.05 srun does not take it over from sbatch.
        srun_args.append(f"--cpus-per-task={resources.cores}")
    if resources.gpus:
        kind = f"{cluster.gpu_type}:" if cluster.gpu_type else ""
        parameters["gpus_per_node"] = f"{kind}{resources.gpus}"
    return {key: value for key, value in parameters.items() if value is not None or key == "wckey"}


def _setup_lines(cluster: Cluster, exports: Mapping[str, str]) -> list[str]:
    # Without the traps the script would end with its job step at the time limit, or by `scancel --signal=USR2 --full`,
    # before its last lines.
    lines = [
        "trap terminated=1 TERM",
        "trap : USR2",
        *cluster.setup,
        *(f"export {key}={shlex.quote(value)}" for key, value in exports.items()),
    ]
    if "OMP_NUM_THREADS" not in cluster.env:
        # Where SLURM decides on the cores, so do the threads.
        lines.append('export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-$OMP_NUM_THREADS}"')
    return lines


def _last_lines(folders: Sequence[Path], code: Path) -> list[str]:
    """After srun: decide whether the job comes back (restarts.py), and exit as it went."""
    quoted = " ".join(shlex.quote(str(folder)) for folder in folders)
    return [
        "code=$?",
        f"folders=({quoted})",
        f"{shlex.quote(sys.executable)} {shlex.quote(str(code / 'cluster' / 'restarts.py'))} "
        '"${folders[${SLURM_ARRAY_TASK_ID:-0}]}" "$code" ${terminated:+--terminated}',
        "exit $?",
    ]


def batch_script(parameters: Mapping[str, Any], folder: Path) -> str:
    """The script that sbatch would be given, for --dry-run."""
    from submitit.slurm.slurm import _make_sbatch_string

    return str(
        _make_sbatch_string(command=f"{sys.executable} -P -u -m submitit.core._submit ...", folder=folder, **parameters)
    )


def submit_slurm(jobs: Sequence[Job], folder: Path, parameters: Mapping[str, Any]) -> list[str]:
    """Submit one job, or several as an array. Returns SLURM's job ids.

    Raises:
        UserError: sbatch refused; carries its message.
    """
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=_MANY, python=f"{shlex.quote(sys.executable)} -P")
    executor.update_parameters(**parameters)
    try:
        if len(jobs) == 1:
            return [executor.submit(jobs[0]).job_id]
        with executor.batch():
            handles = [executor.submit(job) for job in jobs]
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"SLURM refused the job: {str(error).strip()}") from None
    return [handle.job_id for handle in handles]


def submit_local(
    job: Job, submission: Submission, resources: Resources, *, code: Path, exports: Mapping[str, str]
) -> str:
    """Start the job's supervisor on this machine and return its process id. It outlives the launcher."""
    import submitit

    class SupervisedExecutor(submitit.LocalExecutor):
        """submitit's local executor with our controller."""

        def _submit_command(self, command: str) -> Any:
            process = _start_supervisor(command, submission, resources, code=code, exports=exports)
            return self.job_class(
                folder=self.folder, job_id=str(process.pid), process=process, tasks=list(range(resources.processes))
            )

    executor = SupervisedExecutor(submission.submitit_folder, python=f"{shlex.quote(sys.executable)} -P")
    executor.update_parameters(tasks_per_node=resources.processes)
    return str(executor.submit(job).job_id)


def _start_supervisor(
    command: str, submission: Submission, resources: Resources, *, code: Path, exports: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start supervise.py in a session of its own, so that Ctrl-C at the terminal does not reach it."""
    own = {
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_COMMAND": command,
        "SUBMITIT_LOCAL_NTASKS": str(resources.processes),
        "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
        "SUBMITIT_LOCAL_NODEID": "0",
        "CUDA_VISIBLE_DEVICES": ",".join(local_gpus()[: resources.gpus]),
    }
    script = code / "cluster" / "supervise.py"
    start = f"exec {shlex.join([sys.executable, str(script), str(submission.folder)])}"
    with (submission.folder / "supervisor.log").open("ab") as log:
        return subprocess.Popen(
            ["/bin/bash", "-c", "\n".join(["set -e", *resources.cluster.setup, start])],
            env={**os.environ, **exports, **own},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def record(
    submission: Submission,
    resources: Resources,
    *,
    job: str,
    job_id: str,
    code: Path,
    max_restarts: int,
    after: Sequence[Submission] = (),
) -> None:
    """Write down what was submitted."""
    local = resources.executor == "local"
    submission.write_record(
        Record(
            link=submission.link,
            job=job,
            executor=resources.executor,
            job_id=job_id,
            host=socket.gethostname(),
            started_at=started_at(int(job_id)) or 0.0 if local else 0.0,
            submitted=time.time(),
            code=str(code),
            nodes=resources.nodes,
            processes=resources.processes,
            max_restarts=max_restarts,
            after=tuple(other.folder.name for other in after),
            folder=str(submission.folder.absolute()),
        )
    )
