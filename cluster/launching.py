"""The steps of a launch: check, plan, prepare the run's folder, submit, follow.

Owns: their order, and what is printed between them.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster import chain, control, executor, preflight, snapshot
from cluster.chain import PRETRAIN, Link
from cluster.locate import command_on, located, shown
from cluster.plan import describe, describe_resources, length_of, plan_of
from cluster.resources import Resources, resolve
from cluster.state import WAITING, State, states
from cluster.submission import Submission, hold, latest, newest_step, submissions, write_atomically
from configs import AnyJob, PretrainConfig, UserError, dump, load
from configs.changes import Change, changes, check_length, check_resume
from configs.errors import INTERRUPTED
from configs.schema import RUN_NAME


def launch(config: AnyJob, *, dry_run: bool, detach: bool, home: Path | None = None) -> int:
    """Launch a configuration, or go on with what lies in its folder. Returns the exit code.

    Args:
        dry_run: print everything, change nothing.
        detach: return after the submission.
        home: the folder, where it is known (resume).
    """
    config = located(config)
    home = Path(chain.home_of(config) if home is None else home).absolute()
    missing = preflight.missing_data(config)
    if not dry_run:
        preflight.stop_on_errors(missing)
    changed = check_folder(config, home)
    resources = resolve(config.cluster)
    links = chain.links(config, home, in_sequence=resources.executor == "local")
    wanted, past, now = what_is_missing(links, home)
    each = chain.resources_of(links)
    found = [*missing, *preflight.checks(config, home, links, each)]
    if dry_run:
        print_dry_run(config, home, wanted, each, found)
        preflight.stop_on_errors(found)
        return 0
    preflight.stop_on_errors(found)
    for check in found:
        if check.level == "warning":
            print(f"warning: {check.text}", file=sys.stderr)
    if not wanted:
        print(f"{shown(home)} is finished; a longer run: {command_on('resume', home)} steps=...")
        return 0
    submitted = submit(config, home, wanted, past, now)
    announce(config, home, submitted, each, changed)
    if detach:
        print(f"follow: {command_on('status', home)} -f")
        return 0
    return watch(home, submitted)


class UnderWayError(UserError):
    """What would be launched is queued or running already."""


def check_folder(config: AnyJob, home: Path) -> list[Change]:
    """Whether the configuration may go on with what lies in the folder. Returns what has changed.

    Raises:
        UserError: what was saved there is another training's, or a longer one's.
    """
    stored = home / "config.yaml"
    if not isinstance(config, PretrainConfig) or not stored.is_file():
        return []
    old = load(stored)
    if not isinstance(old, PretrainConfig):
        raise UserError(f"{shown(home)} holds another kind of job ({old.job}); choose another name=")
    moved = old.model_copy(update={"runs_dir": config.runs_dir, "name": config.name})
    is_begun = any((home / "checkpoints").glob("*step_*")) or (home / "export").exists()
    if not is_begun:
        return changes(moved, config)
    changed, steps = check_resume(moved, config, shown(home)), length_of(config)
    if steps is not None:
        check_length(steps, newest_step(home), shown(home))
    return changed


def what_is_missing(
    links: Sequence[Link], home: Path
) -> tuple[list[Link], dict[str, Submission], dict[Submission, State]]:
    """Links to submit, the last submissions of all links, and their states.

    Raises:
        UnderWayError: the first link that would be submitted is queued or running already: the run is running.
        UserError: a training that was finished would begin anew, since its checkpoints are gone.
    """
    names = {link.name for link in links}
    past = {name: one for name, one in latest(home).items() if name in names}
    now = states(past.values())
    wanted = chain.missing(links, past, now)
    running = [(name, now[past[name]]) for name in past if now[past[name]].name in WAITING]
    is_pretrain_alive = any(name == PRETRAIN for name, _ in running)
    if running and (is_pretrain_alive or not wanted):
        name, state = running[0]
        raise UnderWayError(
            f"{shown(home)} is {state.name} already: {name}, {state.where}\n"
            f"       follow it: {command_on('status', home)} -f    end it: {command_on('cancel', home)}"
        )
    begins_anew = any(link.name == PRETRAIN for link in wanted) and not any((home / "checkpoints").glob("*step_*"))
    if begins_anew and (home / "export").exists():
        raise UserError(
            f"{shown(home)} holds an export, but no checkpoints to go on from: it would begin anew and replace the "
            f"export;\n       start a new run with name=... (from these weights: init_from={shown(home / 'export')})"
        )
    return wanted, past, now


def submit(
    config: AnyJob, home: Path, wanted: Sequence[Link], past: Mapping[str, Submission], now: Mapping[Submission, State]
) -> list[Submission]:
    """Prepare the folder and hand over what is missing."""
    fetch_weights(config)
    names = {link.name for link in wanted}
    with hold(home):
        # Between the checks and here, another launcher may have been faster.
        if any(one.link in names and one != past.get(one.link) for one in latest(home).values()):
            raise UserError(f"{shown(home)}: another launch was faster; see {command_on('status', home)}")
        if isinstance(config, PretrainConfig):
            write_atomically(home / "config.yaml", dump(config))
        for link in wanted:
            if link.name in past and now[past[link.name]].name in WAITING:
                control.end_now(past[link.name])
        try:
            return chain.submit(wanted, home, past, now)
        except KeyboardInterrupt:
            print(f"\nwhat was submitted already goes on; end it: {command_on('cancel', home)}")
            raise


def fetch_weights(config: AnyJob) -> None:
    """Fetch timm's weights that a job needs, since nodes are often offline."""
    for name in pretrained_names(config):
        _fetch(name, config.runs_dir)


@functools.cache  # the runs of a sweep need the same ones
def _fetch(name: str, runs_dir: str) -> None:
    """Fetch the weights of a model in another process: it needs torch."""
    import subprocess

    print(f"fetching the weights of {name}", flush=True)
    code = f"import timm; timm.create_model({name!r}, pretrained=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        run = Path(runs_dir) / name
        remedy = f"did you mean {shown(run)}?" if run.is_dir() else "check the name and the network"
        raise UserError(f"the weights of {name} cannot be had: {last[:200]}; {remedy}")


def pretrained_names(config: AnyJob) -> list[str]:
    """The timm models whose published weights an evaluation of the job needs."""
    wanted = dict.fromkeys(name for names in chain.backbones(config).values() for name in names)
    return [name for name in wanted if _is_published(name)]


def _is_published(name: str) -> bool:
    if name.startswith(("hf-hub:", "hf_hub:")):
        return True
    return not (Path(name).exists() or "/" in name or ":" in name or name.startswith(("akorn", "itrsa")))


def announce(
    config: AnyJob,
    home: Path,
    submitted: Sequence[Submission],
    each: Mapping[str, Resources],
    changed: Sequence[Change],
) -> None:
    """Say what was submitted and where to look."""
    for change in changed:
        print(f"changed: {change}")
    first = each[submitted[0].link]
    plan = ""
    if isinstance(config, PretrainConfig) and submitted[0].link == PRETRAIN:
        numbers = plan_of(config, first)
        steps = f", {numbers.steps:,} steps" if numbers.steps else ""
        plan = f": {config.model.name}, batch {config.batch_size}{steps}"
    print(f"{shown(home)}{plan}")
    for submission in submitted:
        record = submission.record()
        assert record is not None
        where = f"SLURM job {record.job_id}" if record.executor == "slurm" else f"process {record.job_id}"
        waits = f", after {', '.join(name.partition('_')[2] for name in record.after)}" if record.after else ""
        print(f"  {submission.link}: {where}{waits}")
    print(f"{describe_resources(first)}; logs in {shown(home / 'logs')}", flush=True)


def watch(home: Path, submitted: Sequence[Submission] | None = None) -> int:
    """Follow to the end. Ctrl-C leaves a SLURM job alone and stops a local one that was launched here.

    Args:
        submitted: what was launched by this command; None: only look on.
    """
    from cluster.follow import follow

    links = list(latest(home).values()) if submitted is None else list(submitted)
    try:
        final = follow(home, links, planned_steps(home))
    except KeyboardInterrupt:
        if submitted is None:
            return 0
        return _interrupted(home, links)
    if all(state.name == "finished" for state in final.values()):
        point_to_results(home, links)
        return 0
    print(f"go on from where it broke: {command_on('resume', home)}")
    return 1


def _interrupted(home: Path, links: Sequence[Submission]) -> int:
    if not control.is_local(links):
        print(f"\nno longer following; the job goes on. {command_on('status', home)}")
        return 0
    print("\nsaving and stopping; Ctrl-C again to end at once", flush=True)
    control.stop_local(links)
    print(f"stopped; go on with: {command_on('resume', home)}")
    return INTERRUPTED


def planned_steps(home: Path) -> int | None:
    if not (home / "config.yaml").is_file():
        return None
    config = load(home / "config.yaml")
    if not isinstance(config, PretrainConfig):
        return None
    return length_of(config)


def point_to_results(home: Path, links: Sequence[Submission]) -> None:
    """Say where the results of these links lie."""
    places = {PRETRAIN: [home / "export"], chain.REPORT: [home / "report.html"]}
    for link in links:
        evaluation = [home / "downstream" / link.link / "results.json", home / "results.json"]
        for path in places.get(link.link, evaluation):
            if path.exists():
                print(f"  {shown(path)}")


def config_to_resume(home: Path, overrides: Sequence[str]) -> AnyJob:
    """The configuration to resume, under the name and at the place that the folder has now.

    Raises:
        UserError: the overrides would give it others.
    """
    if any(override.startswith(("name=", "runs_dir=")) for override in overrides):
        raise UserError(
            f"{shown(home)} goes on where it lies; another run from here on: copy the folder and resume the copy"
        )
    config = load(config_file(home), overrides)
    if not isinstance(config, PretrainConfig):
        return config
    name = home.name if re.fullmatch(RUN_NAME, home.name) else config.name
    return config.model_copy(update={"name": name, "runs_dir": str(home.parent)})


def config_file(home: Path) -> Path:
    """The configuration to resume: the run's, or that of the evaluation the folder belongs to.

    Raises:
        UserError: there is none.
    """
    if (home / "config.yaml").is_file():
        return home / "config.yaml"
    found = [one.folder / "config.yaml" for one in submissions(home) if (one.folder / "config.yaml").is_file()]
    if not found:
        raise UserError(f"{shown(home)} has no config.yaml; launch it from its configuration instead")
    return found[-1]


def print_dry_run(
    config: AnyJob, home: Path, wanted: Sequence[Link], each: Mapping[str, Resources], found: Sequence[preflight.Check]
) -> None:
    """The resolved configuration, the plan, the checks, and what would be submitted."""
    print(dump(config))
    if isinstance(config, PretrainConfig):
        for label, text in describe(config, home, plan_of(config, each[PRETRAIN])):
            print(f"{label:12}{text}")
    for link in wanted:
        waits = f", after {', '.join([*link.needs, *link.after])}" if link.needs else ""
        print(f"{'submit':12}{link.name}: {describe_resources(each[link.name])}{waits}")
    if wanted and each[wanted[0].name].executor == "slurm":
        print(f"{'script':12}of {wanted[0].name}; the others differ in name, resources and dependency")
        print(_script(wanted[0], home, each[wanted[0].name]))
    for check in found:
        print(f"{check.level:12}{check.text}")
    names = ", ".join(link.name for link in wanted) or "nothing: all is finished"
    if any(check.level == "error" for check in found):
        names = "nothing: see the errors"
    print(f"would submit: {names}  (dry run: nothing was changed)")


def _script(link: Link, home: Path, resources: Resources) -> str:
    """The batch script of a link, with placeholders for what only a submission knows."""
    code, folder = home / "code" / "SNAPSHOT", home / "jobs" / f"NNNN_{link.name}"
    after = ":".join(["afterok", *(f"<{name}>" for name in link.needs)]) if link.needs else ""
    parameters = executor.slurm_parameters(
        resources,
        name=f"{home.name}-{link.name}",
        folders=[folder],
        code=code,
        exports=executor.variables(resources, code, snapshot.commit()),
        after=after,
    )
    script = executor.batch_script(parameters, folder / "submitit")
    return "\n".join(f"    {line}" for line in script.splitlines())
