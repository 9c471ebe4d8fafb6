"""The links of a run: pretraining, the evaluations of its `downstream:` list, the report; or one evaluation alone.

Owns: which links a configuration has, what each waits for, which of them must run (again), and their submission.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster import executor, snapshot
from cluster.job import Job
from cluster.resources import Resources, resolve
from cluster.state import WAITING, State
from cluster.submission import Submission, new_submission, write_atomically
from configs import AnyJob, PretrainConfig, dump, load
from configs.cluster import Cluster
from configs.jobs import DownstreamJob

PRETRAIN, REPORT = "pretrain", "report"
ENTRIES = {
    "pretrain": "pretrain.train:run",
    "object_discovery": "downstream.object_discovery:run",
    "linear_probe": "downstream.linear_probe:run",
    "sudoku": "downstream.sudoku:run",
    "robustness": "downstream.robustness:run",
    "report": "downstream.report:run",
}
# An evaluation starts again so often without new partial results in between; a pretraining as its configuration says.
_EVALUATION_RESTARTS = 2


@dataclass(frozen=True)
class Link:
    """One job of a run."""

    name: str
    job: str  # a key of ENTRIES
    config: AnyJob | None  # None for the report
    cluster: Cluster
    needs: tuple[str, ...] = ()  # links that must have finished
    after: tuple[str, ...] = ()  # links that must be over, however they ended

    @property
    def max_restarts(self) -> int:
        return self.config.resilience.max_restarts if isinstance(self.config, PretrainConfig) else _EVALUATION_RESTARTS


def home_of(config: AnyJob) -> Path:
    """The folder of a job's files: the run's, or for an evaluation the run it looks at, or that of its results."""
    if isinstance(config, PretrainConfig):
        return Path(config.run_dir)
    ckpt = config.ckpt or "none"
    if (Path(ckpt) / "config.yaml").is_file():
        return Path(ckpt)
    if config.out is not None:
        return Path(config.out)
    return Path("results") / config.job / re.sub(r"[^\w.-]+", "_", ckpt).strip("_.")


def evaluations(config: AnyJob) -> list[tuple[str, DownstreamJob]]:
    """The evaluations of a run, or the one that a job is, each behind the beginning of its keys."""
    if isinstance(config, PretrainConfig):
        return [(f"downstream.{i}.", evaluation) for i, evaluation in enumerate(config.downstream)]
    return [("", config)]


def backbones(config: AnyJob) -> dict[str, tuple[str, ...]]:
    """The models that a job's evaluations read, by the key that names them."""
    named: dict[str, tuple[str, ...]] = {}
    for prefix, evaluation in evaluations(config):
        for key in ("ckpt", "also", "transfer_from"):
            value: str | tuple[str, ...] = getattr(evaluation, key, None) or ()
            named[prefix + key] = (value,) if isinstance(value, str) else value
    return named


def links(config: AnyJob, home: Path, *, in_sequence: bool) -> list[Link]:
    """All links of a configuration, in order.

    Args:
        in_sequence: whether evaluations wait for each other, as on one machine, or run side by side.
    """
    if not isinstance(config, PretrainConfig):
        name = config.name or config.job
        return [Link(name, config.job, _placed(config, home, name, None), config.cluster)]
    found = [Link(PRETRAIN, PRETRAIN, config, config.cluster)]
    if not config.downstream:
        return found
    used: set[str] = {PRETRAIN, REPORT}
    for evaluation in config.downstream:
        name = _unused(evaluation.name or evaluation.job, used)
        placed = _placed(evaluation, home, name, config.cluster)
        after = (found[-1].name,) if in_sequence and len(found) > 1 else ()
        found.append(Link(name, placed.job, placed, placed.cluster, needs=(PRETRAIN,), after=after))
    names = tuple(link.name for link in found[1:])
    small = inherit(Cluster(processes=1, gpus=0), config.cluster)
    return [*found, Link(REPORT, REPORT, None, small, needs=(PRETRAIN,), after=names)]


def _unused(name: str, used: set[str]) -> str:
    number, candidate = 1, name
    while candidate in used:
        number += 1
        candidate = f"{name}_{number}"
    used.add(candidate)
    return candidate


def _placed(config: AnyJob, home: Path, name: str, run_cluster: Cluster | None) -> AnyJob:
    """An evaluation with everything definite: backbone, folder of its results, resources."""
    assert not isinstance(config, PretrainConfig)
    is_run = run_cluster is not None or (home / "config.yaml").is_file()
    out = config.out or str(home / "downstream" / name if is_run else home)
    cluster = config.cluster if run_cluster is None else inherit(config.cluster, run_cluster)
    ckpt = str(home) if run_cluster is not None and config.ckpt is None else config.ckpt
    return config.model_copy(update={"ckpt": ckpt, "out": out, "name": name, "cluster": cluster})


def inherit(own: Cluster, run_cluster: Cluster) -> Cluster:
    """Resources of an evaluation in a chain: its own keys, the run's where it has none; one node and one process."""
    plain = Cluster()
    set_keys = {key: value for key, value in own if value != getattr(plain, key)}
    one = {"nodes": 1, "processes": 1, "gpus": None if run_cluster.gpus is None else min(1, run_cluster.gpus)}
    return run_cluster.model_copy(update=one | set_keys)


def missing(chain: Sequence[Link], past: Mapping[str, Submission], states: Mapping[Submission, State]) -> list[Link]:
    """The links that must be submitted: those that are neither under way nor finished as they are configured now, and
    those behind a link that runs again."""
    wanted: list[Link] = []
    again: set[str] = set()
    for link in chain:
        before = past.get(link.name)
        state = states[before].name if before else "lost"
        behind = again & {*link.needs, *(link.after if link.name == REPORT else ())}
        done = state in WAITING or (state == "finished" and before is not None and not _changed(link, before))
        if behind or not done:
            wanted.append(link)
            again.add(link.name)
    return wanted


def _changed(link: Link, before: Submission) -> bool:
    """Whether a link that finished was run with another configuration than it has now. Of a pretraining only the length
    counts: what else may change, changes nothing of the result."""
    if link.config is None:
        return False
    path = before.folder / "config.yaml"
    if not path.is_file():
        return True
    stored = load(path)
    if isinstance(link.config, PretrainConfig) and isinstance(stored, PretrainConfig):
        return (stored.steps, stored.epochs) != (link.config.steps, link.config.epochs)
    return type(stored) is not type(link.config) or _essence(stored) != _essence(link.config)


def _essence(config: AnyJob) -> AnyJob:
    """An evaluation without what changes nothing of its result: its resources, and where its own run lies."""
    assert not isinstance(config, PretrainConfig)
    is_own = config.out == f"{config.ckpt}/downstream/{config.name}"
    place = {"ckpt": None, "out": None} if is_own else {}
    return config.model_copy(update={"cluster": Cluster(), "runs_dir": "", **place})


def submit(
    wanted: Sequence[Link], home: Path, past: Mapping[str, Submission], states: Mapping[Submission, State]
) -> list[Submission]:
    """Submit links in order, each waiting for those it needs that are submitted now or still under way."""
    code, commit = snapshot.take(home), snapshot.commit()
    waiting_for = {name: old for name, old in past.items() if states[old].name in WAITING}
    submitted: list[Submission] = []
    for link in wanted:
        resources = resolve(link.cluster)
        submission = new_submission(home, link.name)
        if link.config is not None:
            write_atomically(submission.folder / "config.yaml", dump(link.config))
        needs = [waiting_for[name] for name in link.needs if name in waiting_for]
        after = [waiting_for[name] for name in link.after if name in waiting_for]
        job = Job(str(submission.folder.absolute()), ENTRIES[link.job])
        exports = executor.variables(resources, code, commit)
        if resources.executor == "slurm":
            parameters = executor.slurm_parameters(
                resources,
                name=f"{home.name}-{link.name}",
                folders=[submission.folder.absolute()],
                code=code,
                exports=exports,
                after=dependency(needs, after),
            )
            (job_id,) = executor.submit_slurm([job], submission.submitit_folder, parameters)
        else:
            job_id = executor.submit_local(job, submission, resources, code=code, exports=exports)
        executor.record(
            submission,
            resources,
            job=link.job,
            job_id=job_id,
            code=code,
            max_restarts=link.max_restarts,
            after=[*needs, *after],
        )
        waiting_for[link.name] = submission
        submitted.append(submission)
    return submitted


def dependency(needs: Sequence[Submission], after: Sequence[Submission]) -> str:
    """SLURM's expression for: all of `needs` finished, all of `after` over."""
    parts = []
    for kind, group in (("afterok", needs), ("afterany", after)):
        ids = [record.job_id for other in group if (record := other.record()) and record.executor == "slurm"]
        if ids:
            parts.append(":".join([kind, *ids]))
    return ",".join(parts)


def resources_of(chain: Sequence[Link]) -> dict[str, Resources]:
    """Definite resources of all links, for the plan."""
    return {link.name: resolve(link.cluster) for link in chain}
