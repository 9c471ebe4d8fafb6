"""Where and how a job runs: executor, nodes, processes, and what SLURM is asked for."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, PositiveInt

from configs.section import Section


class Cluster(Section):
    """Resources of a job. They decide how a training is computed, never what: all may change on resume."""

    may_change_on_resume: ClassVar[bool] = True

    executor: Literal["auto", "slurm", "local"] = Field("auto", description="auto: SLURM where its controller answers")
    nodes: PositiveInt = Field(1, description="number of nodes")
    processes: PositiveInt | None = Field(
        None, description="processes per node; default: one per GPU, or one where there is no GPU"
    )
    gpus: int | None = Field(None, ge=0, description="GPUs per node; default: all of the node; 0 on CPU clusters")
    gpu_type: str | None = Field(None, description="type of GPU as SLURM names it, e.g. h100")
    cpus_per_process: PositiveInt | None = Field(
        None, description="CPU cores per process; default: cores / processes, on SLURM its own (often one)"
    )
    memory_gb: PositiveInt | None = Field(None, description="memory per node in GB; default: the partition's")
    time_min: PositiveInt = Field(
        1440, description="time limit of one submission in minutes; a run is requeued past it"
    )
    partition: str | None = Field(None, description="SLURM partition")
    account: str | None = Field(None, description="SLURM account")
    qos: str | None = Field(None, description="SLURM quality of service")
    constraint: str | None = Field(None, description="SLURM constraint, e.g. a100|h100")
    exclude: str | None = Field(None, description="nodes not to use")
    srun_args: tuple[str, ...] = Field((), description="further options of srun, e.g. --container-image=...")
    sbatch_args: dict[str, str | int | Literal[True]] = Field(
        default_factory=dict, description="further options of sbatch by name; true: without a value"
    )
    setup: tuple[str, ...] = Field((), description="shell lines to run on the node before the job, e.g. module load")
    env: dict[str, str] = Field(default_factory=dict, description="environment variables of the job")
    port: int | None = Field(None, ge=1024, le=65535, description="rendezvous port; default: chosen from the job id")
    interface: str | None = Field(None, description="network interface of NCCL and gloo, e.g. ib0")
    signal_s: PositiveInt = Field(120, description="seconds before the time limit at which the job is told to save")
