"""Sweeps: one run for each combination of values, as job arrays on SLURM, one after the other on this machine.

Owns: the combinations, the names of their runs, and the submission of the arrays.
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

from cluster import chain, executor, foreign, launching, snapshot
from cluster.chain import PRETRAIN
from cluster.job import Job
from cluster.locate import located, shown
from cluster.preflight import checks, missing_data, stop_on_errors
from cluster.resources import Resources, resolve
from cluster.state import State
from cluster.submission import Submission, new_submission, write_atomically
from configs import PretrainConfig, UserError, dump, load
from configs.errors import INTERRUPTED


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
        # Says what is wrong with a value before it becomes a name.
        load(config_name, [*overrides, *chosen], foreign=foreign.check)
        config = load(config_name, [*overrides, *chosen, f"name={name_of(base.name, chosen)}"])
        assert isinstance(config, PretrainConfig)
        runs.append(config)
    for name, count in Counter(run.name for run in runs).items():
        if count > 1:
            raise UserError(f"--sweep: {count} runs would be called {name}; launch them one by one with name=...")
    return runs


def launch(config_name: str, overrides: Sequence[str], sweeps: Sequence[str], *, dry_run: bool, detach: bool) -> int:
    """Launch all runs of a sweep, go on with those that are there, and leave those alone that are finished or under
    way. Returns the exit code.

    Raises:
        UserError: something is wrong with one of the runs; none was launched.
    """
    configs = [located(config) for config in configurations(config_name, overrides, sweeps)]
    on_slurm = resolve(configs[0].cluster).executor == "slurm"
    if detach and not on_slurm and not dry_run:
        raise UserError("--sweep on this machine runs one after the other and cannot be detached; use nohup or tmux")
    wanted = {config.run_dir: _outlook(config, on_slurm=on_slurm) for config in configs}
    if dry_run:
        print(f"{len(configs)} runs, {'in job arrays' if on_slurm else 'one after the other'}:")
    for home, (_, outlook) in wanted.items():
        print(f"  {shown(home)}: {outlook}")
    chosen = [config for config in configs if wanted[config.run_dir][0]]
    if dry_run:
        return launching.launch(chosen[0], dry_run=True, detach=True) if chosen else 0
    if not on_slurm:
        return _one_after_the_other(chosen)
    begun = [config for config in chosen if (Path(config.run_dir) / "jobs").exists()]
    new = [config for config in chosen if config not in begun]
    for config in new:
        launching.fetch_weights(config)
    codes = [launching.launch(config, dry_run=False, detach=True) for config in begun]
    while new:  # tasks of an array share their resources
        alike = [config for config in new if config.cluster == new[0].cluster]
        _launch_array(alike, resolve(new[0].cluster))
        new = [config for config in new if config not in alike]
    return max(codes, default=0)


def _outlook(config: PretrainConfig, *, on_slurm: bool) -> tuple[bool, str]:
    """Whether a run of a sweep is to be launched, and what would become of it.

    Raises:
        UserError: something is wrong with it.
    """
    home = Path(config.run_dir)
    stop_on_errors(missing_data(config))
    launching.check_folder(config, home)
    links = chain.links(config, home, in_sequence=not on_slurm)
    try:
        missing, past, _ = launching.what_is_missing(links, home)
    except launching.UnderWayError:
        return False, "is under way"
    if not missing:
        return False, "is finished"
    stop_on_errors(checks(config, home, links, chain.resources_of(links)))
    return True, f"{'goes on with' if past else 'new:'} {', '.join(link.name for link in missing)}"


def _one_after_the_other(configs: Sequence[PretrainConfig]) -> int:
    """Launch runs on this machine until all are over or the user has stopped one."""
    worst = 0
    for config in configs:
        code = launching.launch(config, dry_run=False, detach=False)
        worst = max(worst, code)
        if code == INTERRUPTED:
            break
    return worst


def _launch_array(configs: Sequence[PretrainConfig], resources: Resources) -> None:
    """Submit new trainings as one array, and the evaluations of each behind its task."""
    homes = [Path(config.run_dir) for config in configs]
    beside = homes[0].parent / ".sweeps"  # for what all tasks use: any of the runs may be removed before others begin
    code, commit = snapshot.take(beside), snapshot.commit()
    trainings = [_prepare(config, home) for config, home in zip(configs, homes)]
    folder = beside / f"{time.strftime('%Y%m%d-%H%M%S')}-{homes[0].name}"
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


def _prepare(config: PretrainConfig, home: Path) -> Submission:
    home.mkdir(parents=True, exist_ok=True)
    write_atomically(home / "config.yaml", dump(config))
    submission = new_submission(home, PRETRAIN)
    write_atomically(submission.folder / "config.yaml", dump(config))
    return submission
