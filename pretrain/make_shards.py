"""Write a shard set: images (and labels, masks) of a source become shuffled WebDataset tars with an index.

python pretrain/make_shards.py tetrominoes data/tetrominoes --count 20000
python pretrain/make_shards.py folder ~/pictures data/pictures --resize 320
python pretrain/make_shards.py --verify data/tetrominoes
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from configs.errors import UserError, run

if TYPE_CHECKING:
    from pretrain.data.making import Progress
    from pretrain.data.sources.sample import Source


@dataclass(frozen=True)
class Kind:
    """A kind of source: its module in pretrain/data/sources (with `open_source`), one line of help."""

    module: str
    help: str
    has_input: bool = True


# Here and not among the sources, so that a wrong name is told at once: importing from pretrain loads torch.
KINDS: dict[str, Kind] = {
    "folder": Kind("folder", "images in a folder, tar or zip: a class for each subfolder, or flat"),
    "imagenet": Kind("imagenet", "ILSVRC 2012 as downloaded (train tar, val tar, development kit) or unpacked"),
    "cifar10": Kind("cifar10", "the Python archive, or {train,test}/CLASS/*.jpg in a folder, tar or zip"),
    "voc": Kind("voc", "PascalVOC 2012 with instance and class masks"),
    "coco": Kind("coco", "COCO 2017 with instance and class masks"),
    "clevrtex-full": Kind("clevrtex", "CLEVRTex with instance masks"),
    "clevrtex-outd": Kind("clevrtex", "its set of unseen shapes and textures (test only)"),
    "clevrtex-camo": Kind("clevrtex", "its camouflaged set"),
    "clevr6-records": Kind("multiobject", "CLEVR with masks, at most 6 objects, from its .tfrecords file"),
    "clevr-records": Kind("multiobject", "CLEVR with masks, all scenes"),
    "tetrominoes-records": Kind("multiobject", "the original Tetrominoes, from its .tfrecords file"),
    "multi-dsprites-records": Kind("multiobject", "the original multi-dSprites on greyscale, from its .tfrecords file"),
    "npz": Kind("npz", "images and labels of the published code's .npz files"),
    "shards": Kind("existing", "tars made by others, written anew and shuffled"),
    "tetrominoes": Kind("generated", "3 tetrominoes in 6 colours on black, 32 px", has_input=False),
    "tetrominoes-one-colour": Kind("generated", "the same, all objects of a scene in one colour", has_input=False),
    "tetrominoes-white": Kind("generated", "the same, all objects white", has_input=False),
    "multi-dsprites": Kind("generated", "2 to 5 coloured sprites with occlusion on grey, 64 px", has_input=False),
    "shapes": Kind("generated", "2 to 4 outlined shapes, overlapping, 40 px", has_input=False),
    "clevr-scenes": Kind(
        "clevr_scenes", "3 to 6 rendered solids with shadows, 128 px; needs pybullet", has_input=False
    ),
    "clevr-scenes-10": Kind("clevr_scenes", "the same with 3 to 10 objects", has_input=False),
    "sudoku": Kind("sudoku", "generated Sudokus with one solution, --givens A-B (default 31-42)", has_input=False),
    "sudoku-file": Kind("sudoku", "puzzle lines, RRN CSV, SATNet folder; with --givens: harder ones made from them"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make_shards.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="make_shards.py SOURCE [INPUT] OUTPUT [options]\n       make_shards.py --verify OUTPUT\n"
        "       make_shards.py --list",
    )
    add = parser.add_argument
    add("paths", nargs="*", metavar="SOURCE [INPUT] OUTPUT", help="kind of source, what it reads, folder to write")
    add("--list", action="store_true", help="list the kinds of sources and end")
    add("--verify", action="store_true", help="check an existing set: every byte, every image; needs OUTPUT only")
    add("--count", type=int, metavar="N", help="scenes to generate (default 20000); other sources: the first N only")
    add("--seed", type=int, default=0, help="of generated scenes and of the shuffling (default 0)")
    add("--split", action="append", default=[], metavar="NAME", help="only this split; may be given several times")
    add("--givens", metavar="A-B", help="Sudokus: number of givens, uniform over the range")
    add("--resize", type=int, metavar="PX", help="shrink images whose shorter side is longer than PX")
    add("--quality", type=int, default=95, help="JPEG quality of shrunk images (default 95)")
    add(
        "--raw",
        action="store_true",
        help="keep benchmark scenes uncropped (default: as the published protocol cuts them)",
    )
    add("--per-shard", type=int, default=1000, metavar="N", help="pictures in a shard (default 1000)")
    add("--max-broken", type=float, default=0.01, metavar="SHARE", help="broken pictures tolerated (default 0.01)")
    add("--no-check", action="store_true", help="do not decode images to find broken ones")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: cores)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Make or verify shard sets. Returns the exit code; errors of the user are raised as `UserError`."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.list:
        return _list()
    if options.verify:
        return _verify(options)
    _check_numbers(options)
    kind, source_input, out = _paths(options)
    _check_applies(kind, options)
    from pretrain.data.sources.sample import Request

    temporary = out / ".building" / "unpacked"
    givens = _givens(options.givens)
    request = Request(source_input, temporary, options.count, options.seed, options.raw, tuple(options.split), givens)
    module = import_module(f"pretrain.data.sources.{KINDS[kind].module}")
    sources: dict[str, Source] = dict(module.open_source(kind, request))
    if request.notes:
        print(f"note: {request.notes[0]}" + (f" (and {len(request.notes) - 1} more)" if request.notes[1:] else ""))
    unknown = [name for name in options.split if name not in sources]
    if unknown:
        raise UserError(f"{kind} has no split {unknown[0]!r} here; it has {', '.join(sources) or 'none'}")
    for split, source in sources.items():
        if not options.split or split in options.split:
            _make(kind, source_input, split, source, out / split, options)
    if temporary.exists():
        import shutil

        shutil.rmtree(temporary.parent)
    return 0


def _givens(text: str | None) -> tuple[int, int] | None:
    from pretrain.data.sources.sudoku import parse_givens

    return None if text is None else parse_givens(text)


def _check_numbers(options: argparse.Namespace) -> None:
    for name, least in {"count": 1, "resize": 8, "per_shard": 1, "workers": 0}.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    if not 0 <= options.max_broken <= 1:
        raise UserError(f"--max-broken is a share between 0 and 1, not {options.max_broken:g}")
    if not 1 <= options.quality <= 100:
        raise UserError(f"--quality is between 1 and 100, not {options.quality}")
    if options.seed < 0:
        raise UserError(f"--seed must not be negative, not {options.seed}")


def _check_applies(kind: str, options: argparse.Namespace) -> None:
    for name, modules in (("givens", ("sudoku",)), ("raw", ("clevrtex", "multiobject"))):
        if getattr(options, name) and KINDS[kind].module not in modules:
            fitting = ", ".join(other for other, one in KINDS.items() if one.module in modules)
            raise UserError(f"--{name} means nothing for {kind}; it is for {fitting}")


def _paths(options: argparse.Namespace) -> tuple[str, Path | None, Path]:
    """Kind, input (None for generated scenes) and output, checked before anything heavy is imported from them."""
    if not options.paths:
        raise UserError("no SOURCE given; `make_shards.py --list` shows the kinds, --help the options")
    kind, *paths = options.paths
    if kind not in KINDS:
        import difflib

        near = difflib.get_close_matches(kind, KINDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(KINDS)}"
        raise UserError(f"unknown source {kind!r}; {hint}")
    wanted = ["INPUT", "OUTPUT"] if KINDS[kind].has_input else ["OUTPUT"]
    if len(paths) != len(wanted):
        raise UserError(
            f"{kind} takes {' '.join(wanted)}, not {len(paths)} paths: make_shards.py {kind} {' '.join(wanted)}"
        )
    found = [Path(path).expanduser().absolute() for path in paths]
    if len(found) == 2 and not found[0].exists() and "{" not in str(found[0]):
        raise UserError(f"{found[0]} does not exist; INPUT is what {kind} is made from")
    return kind, found[0] if len(found) == 2 else None, found[-1]


def _list() -> int:
    for name, kind in KINDS.items():
        print(f"{name + (' INPUT OUTPUT' if kind.has_input else ' OUTPUT'):38s}{kind.help}")
    return 0


def _make(
    kind: str, source_input: Path | None, split: str, source: Source, out: Path, options: argparse.Namespace
) -> None:
    from pretrain.data.making import Plan, make
    from pretrain.data.sources.picture import Finish

    total = len(source) if options.count is None else min(options.count, len(source))
    finish = Finish(options.resize, options.quality, check=not options.no_check)
    plan = Plan(
        kind,
        str(source_input or ""),
        split,
        f"raw={options.raw} givens={options.givens}",
        total,
        options.per_shard,
        options.seed,
        finish,
    )
    with _progress(f"{kind} {split}".strip(), total) as progress:
        made = make(source, plan, out, max_broken=options.max_broken, workers=options.workers, progress=progress)
    state = "was there already" if made.was_there else "written"
    broken = f", {made.num_broken} broken (listed in broken.jsonl)" if made.num_broken else ""
    print(
        f"{out}: {made.num_samples} samples in {made.num_shards} shards, {made.num_bytes / 1e6:.1f} MB{broken}, {state}"
    )


@contextmanager
def _progress(title: str, total: int) -> Iterator[Progress]:
    """A bar on a terminal, about ten lines otherwise."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(title, total)
        return
    shown = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*shown, TextColumn("{task.fields[note]}"), console=console, transient=True) as bar:
        task = bar.add_task(title, total=total, note="")
        broken = 0

        def advance(pictures: int, lost: int) -> None:
            nonlocal broken
            broken += lost
            bar.update(task, advance=pictures, note=f"{broken} broken" if broken else "")

        yield advance


def _lines(title: str, total: int) -> Progress:
    done = broken = 0

    def advance(pictures: int, lost: int) -> None:
        nonlocal done, broken
        before, done, broken = done, done + pictures, broken + lost
        if before * 10 // total != done * 10 // total:
            print(f"{title}: {done} of {total}" + (f", {broken} broken" if broken else ""), file=sys.stderr, flush=True)

    return advance


def _verify(options: argparse.Namespace) -> int:
    """0 when the set is whole, 1 with a list of what is wrong otherwise."""
    from pretrain.data.verifying import verify

    if len(options.paths) != 1:
        raise UserError("--verify takes one path, the folder of the shard set")
    out = Path(options.paths[0]).expanduser().absolute()
    problems = 0
    for folder in _sets(out):
        report = verify(folder, workers=max(1, options.workers))
        for line in report.problems:
            print(f"{folder}: {line}")
        problems += report.num_problems
        print(f"{folder}: {report.num_samples} samples in {report.num_shards} shards, {report.num_problems} problems")
    return 1 if problems else 0


def _sets(out: Path) -> list[Path]:
    """The folder itself if it holds tars, else its subfolders that do (the splits)."""
    if not out.is_dir():
        raise UserError(f"{out} is no folder")
    found = [
        folder
        for folder in (out, *sorted(path for path in out.iterdir() if path.is_dir()))
        if any(folder.glob("*.tar"))
    ]
    if not found:
        raise UserError(f"no *.tar in {out}")
    return found


if __name__ == "__main__":
    raise SystemExit(run(main))
