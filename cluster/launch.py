"""Launch a job from its configuration, on SLURM or on this machine, and look after it.

python cluster/launch.py CONFIG [key=value ...] [--dry-run] [--detach] [--sweep key=a,b,...]
python cluster/launch.py status|logs|cancel|resume [RUN]
python cluster/launch.py list
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from collections.abc import Callable, Sequence

from cluster import control, foreign, launching, status
from cluster.locate import command_on, shown
from configs import UserError, load
from configs.errors import run

COMMANDS = ("status", "logs", "cancel", "resume", "list")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in COMMANDS:
        return _commands()[arguments[0]](arguments[1:])
    return _launch(arguments)


def _commands() -> dict[str, Callable[[Sequence[str]], int]]:
    return {"status": _status, "logs": _logs, "cancel": _cancel, "resume": _resume, "list": _list}


def _launch(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="launch.py",
        description="Launch a job on SLURM if it is there, else on this machine, and follow its progress.",
        epilog=f"Commands on runs: launch.py {'|'.join(COMMANDS)} (each with --help).",
    )
    parser.add_argument("config", help="a YAML file, or the name of one in configs/")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="keys to change, e.g. optimizer.lr=1e-3"
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be done; change nothing")
    parser.add_argument("--detach", action="store_true", help="submit and return; the job needs no launcher")
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="key=a,b", help="a run for each value (job array on SLURM)"
    )
    arguments = parser.parse_intermixed_args(argv)
    if arguments.sweep:
        from cluster import sweep

        return sweep.launch(
            arguments.config, arguments.overrides, arguments.sweep, dry_run=arguments.dry_run, detach=arguments.detach
        )
    config = load(arguments.config, arguments.overrides, foreign=foreign.check)
    return launching.launch(config, dry_run=arguments.dry_run, detach=arguments.detach)


def _run_parser(command: str, description: str, *, optional: bool = False) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"launch.py {command}", description=description)
    parser.add_argument("run", nargs="?" if optional else None, help="name or folder of a run")
    parser.add_argument("--runs-dir", default="runs", help="folder of all runs (default: runs)")
    return parser


def _status(argv: Sequence[str]) -> int:
    parser = _run_parser("status", "What runs where, how far, how fast, and what happened last.", optional=True)
    parser.add_argument("-f", "--follow", action="store_true", help="follow the progress; Ctrl-C only ends the view")
    arguments = parser.parse_args(argv)
    if arguments.run is None:
        return _list(["--runs-dir", arguments.runs_dir])
    home = status.find_home(arguments.run, arguments.runs_dir)
    if arguments.follow:
        return launching.watch(home)
    rows = status.run_rows(home)
    status.print_table(("job", "state", "where", "restarts", "progress"), rows)
    print(f"last event: {status.last_event(home)}\nfolder: {shown(home)}")
    if status.broke(rows):
        print(f"go on: {command_on('resume', home)}")
    return 0


def _logs(argv: Sequence[str]) -> int:
    parser = _run_parser("logs", "Show the log of a rank.")
    parser.add_argument("--job", help="pretrain or the name of an evaluation (default: the last that started)")
    parser.add_argument("--rank", type=int, default=0, help="which process (default: 0)")
    parser.add_argument("-n", "--lines", type=int, default=50, help="how many lines (default: 50)")
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what is appended")
    arguments = parser.parse_args(argv)
    home = status.find_home(arguments.run, arguments.runs_dir)
    path = status.log_file(home, arguments.job, arguments.rank)
    for line in status.stream(path, lines=arguments.lines, keep_on=arguments.follow):
        print(line, flush=arguments.follow)
    return 0


def _cancel(argv: Sequence[str]) -> int:
    parser = _run_parser("cancel", "End a run: it saves and stops. `resume` goes on from there.")
    parser.add_argument("--now", action="store_true", help="do not wait for the save")
    arguments = parser.parse_args(argv)
    return control.cancel(status.find_home(arguments.run, arguments.runs_dir), now=arguments.now)


def _resume(argv: Sequence[str]) -> int:
    parser = _run_parser("resume", "Go on with a run where it ended or broke; what has finished is not done again.")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="keys that may change, e.g. steps=20000"
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be done; change nothing")
    parser.add_argument("--detach", action="store_true", help="submit and return")
    arguments = parser.parse_intermixed_args(argv)
    home = status.find_home(arguments.run, arguments.runs_dir)
    config = launching.config_to_resume(home, arguments.overrides)
    return launching.launch(config, dry_run=arguments.dry_run, detach=arguments.detach, home=home)


def _list(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="launch.py list", description="All runs and how far they are.")
    parser.add_argument("--runs-dir", default="runs", help="folder of all runs (default: runs)")
    arguments = parser.parse_args(argv)
    rows = status.list_rows(arguments.runs_dir)
    if not rows:
        raise UserError(f"no runs in {shown(arguments.runs_dir)}; start one: python cluster/launch.py quickstart.yaml")
    status.print_table(("run", "state", "job", "progress"), rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
