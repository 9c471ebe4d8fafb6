"""Sweeps: one run for each combination of values, as a job array on SLURM, one after the other on this machine.

Owns: the combinations, the names of their runs, and the submission of the array.
"""

from __future__ import annotations

import itertools
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster import chain, executor, launching, snapshot
from cluster.chain import PRETRAIN
from cluster.job import Job
from cluster.locate import command_on, located, shown
from cluster.preflight import checks, stop_on_errors, stop_on_missing_data
from cluster.resources import Resources, resolve
from cluster.state import State
from cluster.submission import Submission, new_submission, write_atomically
from configs import PretrainConfig, UserError, dump, load


def combinations(sweeps: Sequence[str]) -> list[tuple[str, ...]]:
    """Overrides of each run: `["a=1,2", "b=3,4"]` gives (a=1, b=3), (a=1, b=4), (a=2, b=3), (a=2, b=4).

    Commas in brackets do not separate: `model.args={coupling: none},{n: 2, omega: pair}` are two values.

    Raises:
        UserError: one is not of the form key=value,value.
    """
    choices = []
    for item in sweeps:
        key, separator, values = item.partition("=")
        if not separator or not key or not values:
            raise UserError(f"--sweep {item}: expected key=value,value,..., e.g. --sweep optimizer.lr=1e-3,3e-4")
        choices.append([f"{key}={value}" for value in _split(values)])
    return list(itertools.product(*choices))


def _split(values: str) -> list[str]:
    """Parts between commas that stand in no brackets."""
    parts, depth = [""], 0
    for letter in values:
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def name_of(base: str, overrides: Sequence[str]) -> str:
    """Name of one run of a sweep: the last part of each key and its value behind the configuration's name.

    `model={name: itrsa, args: {n: 2}}` becomes itrsa_n-2: mappings give their leaves, names stand for themselves, and
    the numbers of a list are joined by hyphens.
    """
    words = []
    for key, _, value in (item.partition("=") for item in overrides):
        leaves = _leaves(key.rpartition(".")[2], yaml.safe_load(value) if value.startswith(("{", "[")) else value)
        words += [str(leaf) if name == "name" else f"{name}-{leaf}" for name, leaf in leaves]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join([base, *words])).strip("-")


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Names and values at the ends of nested mappings."""
    if isinstance(value, dict):
        for inner, leaf in value.items():
            yield from _leaves(str(inner), leaf)
    else:
        yield name, "-".join(map(str, value)) if isinstance(value, list) else value


def configurations(config_name: str, overrides: Sequence[str], sweeps: Sequence[str]) -> list[PretrainConfig]:
    """The configuration of every run of a sweep, checked.

    Raises:
        UserError: a value is wrong, or two runs would share a folder.
    """
    base = load(config_name, overrides)
    if not isinstance(base, PretrainConfig):
        raise UserError(f"--sweep is for training runs; {config_name} is a {base.job}")
    runs = []
    for chosen in combinations(sweeps):
        load(config_name, [*overrides, *chosen])  # says what is wrong with a value before it becomes a name
        config = load(config_name, [*overrides, *chosen, f"name={name_of(base.name, chosen)}"])
        assert isinstance(config, PretrainConfig)
        runs.append(config)
    for name, count in Counter(run.name for run in runs).items():
        if count > 1:
            raise UserError(f"--sweep: {count} runs would be called {name}; launch them one by one with name=...")
    return runs


def launch(config_name: str, overrides: Sequence[str], sweeps: Sequence[str], *, dry_run: bool, detach: bool) -> int:
    """Launch all runs of a sweep. Returns the exit code."""
    configs = configurations(config_name, overrides, sweeps)
    resources = resolve(configs[0].cluster)
    if dry_run:
        print(f"{len(configs)} runs, {'one job array' if resources.executor == 'slurm' else 'one after the other'}:")
        for config in configs:
            print(f"  {config.run_dir}")
        return launching.launch(configs[0], dry_run=True, detach=True)
    if resources.executor == "slurm":
        return _launch_array([located_run(config) for config in configs], resources)
    if detach:
        raise UserError("--sweep on this machine runs one after the other and cannot be detached; use nohup or tmux")
    codes = [launching.launch(config, dry_run=False, detach=False) for config in configs]
    return max(codes)


def located_run(config: PretrainConfig) -> PretrainConfig:
    """The configuration with absolute paths."""
    there = located(config)
    assert isinstance(there, PretrainConfig)
    return there


def _launch_array(configs: Sequence[PretrainConfig], resources: Resources) -> int:
    """Submit the trainings as one array, and the evaluations of each behind its task."""
    homes = [Path(config.run_dir) for config in configs]
    for config, home in zip(configs, homes):
        if (home / "jobs").exists():
            raise UserError(f"{shown(home)} exists; go on with: {command_on('resume', home)}")
        stop_on_missing_data(config)
        links = chain.links(config, home, in_sequence=False)
        stop_on_errors(checks(config, home, links, chain.resources_of(links)))
    code, commit = snapshot.take(homes[0]), snapshot.commit()
    trainings = [_prepare(config, home) for config, home in zip(configs, homes)]
    folder = homes[0].parent / ".sweeps" / f"{time.strftime('%Y%m%d-%H%M%S')}-{homes[0].name}"
    parameters = executor.slurm_parameters(
        resources,
        name=f"sweep-{homes[0].name}",
        folders=[training.folder for training in trainings],
        code=code,
        exports=executor.variables(resources, code, commit),
        after="",
    )
    jobs = [Job(str(training.folder), chain.ENTRIES[PRETRAIN]) for training in trainings]
    job_ids = executor.submit_slurm(jobs, folder, parameters)
    for config, home, training, job_id in zip(configs, homes, trainings, job_ids):
        training.submitit_folder.symlink_to(folder)  # an array has one for all its tasks
        restarts = config.resilience.max_restarts
        executor.record(training, resources, job=PRETRAIN, job_id=job_id, code=code, max_restarts=restarts)
        links = chain.links(config, home, in_sequence=False)[1:]
        chain.submit(links, home, {PRETRAIN: training}, {training: State("queued")})
        print(f"{shown(home)}: SLURM job {job_id}" + (f" and {len(links)} after it" if links else ""))
    print(f"follow: python cluster/launch.py list --runs-dir {shown(homes[0].parent)}")
    return 0


def _prepare(config: PretrainConfig, home: Path) -> Submission:
    home.mkdir(parents=True, exist_ok=True)
    write_atomically(home / "config.yaml", dump(config))
    submission = new_submission(home, PRETRAIN)
    write_atomically(submission.folder / "config.yaml", dump(config))
    return submission
