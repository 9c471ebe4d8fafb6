"""Checks before anything is queued: what would fail after hours in a queue fails at the prompt, with its remedy.

Owns: the checks of data, disk, memory, versions, permissions and SLURM's limits. None imports torch; together they take
well under a second on a local disk. Each yields a `Check`; a failed one that is an error stops the launch.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster import foreign, slurm
from cluster.chain import Link, backbones, evaluations
from cluster.locate import shown
from cluster.memory import GPU_GIB, checkpoint_gib, estimate_gib
from cluster.plan import Plan, plan_of
from cluster.resources import Resources
from configs import AnyJob, PretrainConfig, UserError

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"
# What a job of any kind imports.
_NEEDED = ("torch", "timm", "deepspeed", "webdataset", "faiss-gpu", "submitit", "safetensors")
# Sources by a word of the path. Of archives every split is written, each to a folder of its own in OUTPUT.
_ARCHIVES = {"imagenet": "IMAGENET_FOLDER", "cifar10": "CIFAR10_ARCHIVE", "voc": "VOC_TAR", "coco": "COCO_FOLDER"}
# What generates them, and how many to train and to test on.
_GENERATED = {
    "tetrominoes-one-colour": ("tetrominoes-one-colour", 20_000, 320),
    "tetrominoes-white": ("tetrominoes-white", 20_000, 320),
    "tetrominoes": ("tetrominoes", 20_000, 320),
    "dsprites": ("multi-dsprites", 20_000, 320),
    "shapes": ("shapes", 20_000, 320),
    "sudoku": ("sudoku", 100_000, 1_000),
}
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_REMOTE = re.compile(r"^(?!file:)[a-zA-Z][a-zA-Z0-9+.-]*:")


@dataclass(frozen=True)
class Check:
    """One finding. `level` is what happens if it is not ok: an error stops the launch, a warning is shown."""

    name: str
    level: Literal["ok", "warning", "error"]
    text: str


def data_checks(config: AnyJob) -> Iterator[Check]:
    """Everything a job reads is there."""
    if isinstance(config, PretrainConfig):
        yield shards_check("data.shards", config.data.shards)
        for key in ("knn_train", "knn_test", "objects_data"):
            if (value := getattr(config.observers, key)) is not None:
                yield shards_check(f"observers.{key}", value)
        if config.init_from is not None and not _may_hold_weights(Path(config.init_from)):
            place = shown(config.init_from)
            yield Check("init_from", "error", f"init_from: no weights at {place}; give a run or an export")
    for prefix, evaluation in evaluations(config):
        yield from _evaluation_data(evaluation, prefix)
    if not isinstance(config, PretrainConfig) and config.ckpt is None and not getattr(config, "also", ()):
        yield Check("ckpt", "error", "ckpt: which backbone? Give ckpt=RUN, an export, a .pth file or a timm model name")
    for key, models in backbones(config).items():
        for model in models:
            yield _model_check(key, model)
    for prefix, evaluation in evaluations(config):
        for key in evaluation.lacking():
            yield Check(prefix + key, "error", f"{prefix}{key}: is not given, and {evaluation.job} needs it")


def _may_hold_weights(path: Path) -> bool:
    return path.is_dir() or (path.is_file() and path.suffix == ".safetensors")


def _evaluation_data(config: AnyJob, prefix: str) -> Iterator[Check]:
    for key in ("train", "data"):
        value = getattr(config, key, None)
        if value is not None:
            yield shards_check(prefix + key, value)
    arrays = getattr(config, "cifar10c", None)
    if arrays is not None and not Path(arrays).is_dir():
        remedy = "give the unpacked CIFAR-10-C, or leave it out"
        yield Check(f"{prefix}cifar10c", "error", f"{prefix}cifar10c: no folder {shown(arrays)}; {remedy}")


def _model_check(key: str, model: str) -> Check:
    looks_like_path = model.endswith((".pth", ".pt", ".safetensors")) or ("/" in model and ":" not in model)
    if looks_like_path and not Path(model).expanduser().exists():
        return Check(key, "error", f"{key}: nothing at {shown(model)}; `python cluster/launch.py list` shows all runs")
    return Check(key, "ok", f"{key}: {shown(model) if looks_like_path else model}")


def shards_check(key: str, shards: str | Sequence[str]) -> Check:
    """Whether a shard set is there and its first tar can be read."""
    items = [shards] if isinstance(shards, str) else list(shards)
    if not items:
        return Check(key, "error", f"{key}: is an empty list; give a folder of shards")
    if any(_REMOTE.match(item) for item in items):
        return Check(key, "ok", f"{key}: remote, read when the job starts")
    for item in items:
        path = Path(_BRACES.sub(lambda match: match.group(1), item).removeprefix("file:"))
        if not path.exists() and any(letter in path.name for letter in "*?["):
            return Check(
                key, "error", f"{key}: wildcards as in {path.name} are not expanded; give {shown(path.parent)}"
            )
        if not path.exists():
            return Check(
                key, "error", f"{key}: no shards at {shown(path)}\n       make them: {make_command(shown(path))}"
            )
        if path.is_dir() and not any(path.glob("*.tar")) and not (path / "features.pt").is_file():  # SATNet's Sudokus
            inside = sorted(sub.name for sub in path.iterdir() if sub.is_dir() and any(sub.glob("*.tar")))
            remedy = f"did you mean {shown(path / inside[0])}?" if inside else f"make them: {make_command(shown(path))}"
            return Check(key, "error", f"{key}: no *.tar in {shown(path)}\n       {remedy}")
        if (path / ".building" / "plan.json").is_file() and not (path / "info.json").is_file():
            return Check(
                key, "error", f"{key}: {shown(path)} is not finished\n       the make_shards.py that makes it goes on"
            )
        first = next(iter(sorted(path.glob("*.tar"))), path) if path.is_dir() else path
        if not os.access(first, os.R_OK):
            return Check(key, "error", f"{key}: {shown(first)} may not be read by you; ask for the permission")
    return Check(key, "ok", f"{key}: found")


def make_command(path: str) -> str:
    """The command that makes a shard set, guessed from where it is looked for."""
    program, place = "python pretrain/make_shards.py", Path(path)
    words = "/".join(place.parts[-2:]).lower()
    for kind, given in _ARCHIVES.items():
        if kind in words:
            out = place.parent if place.name in ("train", "val", "test") else place
            return f"{program} {kind} {given} {out}"
    for word, (kind, learned, tested) in _GENERATED.items():
        if word in words:
            amount = f"{tested} --seed 1" if place.name in ("val", "test") else learned
            return f"{program} {kind} {path} --count {amount}"
    return f"{program} folder IMAGE_FOLDER {path}"


def _existing(path: Path) -> Path:
    """The folder itself or the nearest one above it that exists."""
    return path if path.exists() else _existing(path.parent)


def _gib(amount: float) -> str:
    """Two digits, or the whole number where it has more."""
    return f"{amount:,.0f} GiB" if amount >= 10 else f"{amount:.2g} GiB"


def home_checks(config: AnyJob, home: Path) -> Iterator[Check]:
    """The run's folder can be written, and has room for the checkpoints."""
    folder = _existing(home.absolute())
    if not folder.is_dir():
        yield Check("folder", "error", f"{shown(folder)} is a file; choose another place with runs_dir=... or name=...")
        return
    if not os.access(folder, os.W_OK):
        yield Check(
            "folder", "error", f"{shown(folder)} may not be written by you; choose another place with runs_dir=..."
        )
        return
    free = shutil.disk_usage(folder).free / 2**30
    yield Check("folder", "ok", f"{shown(home)} can be written, {_gib(free)} free")
    if isinstance(config, PretrainConfig) and (each := checkpoint_gib(config)) is not None:
        # One more than are kept, since the old one goes when the new one is whole.
        needed = each * (config.checkpoints.keep_last + 1)
        text = f"checkpoints: about {_gib(each)} each, {_gib(needed)} at once"
        if needed > free:
            yield Check(
                "disk", "error", f"{text}, but {_gib(free)} are free; use runs_dir=... or checkpoints.keep_last=1"
            )
        else:
            yield Check("disk", "ok", text)


def memory_check(config: PretrainConfig, plan: Plan, resources: Resources) -> Check:
    """The training's memory against the GPU that is asked for, by the estimate of memory.py."""
    need = estimate_gib(config, plan, resources)
    if need is None:
        return Check("memory", "ok", f"memory: no estimate for {config.model.name}")
    kind = (resources.cluster.gpu_type or "").lower()
    have = next((gib for name, gib in GPU_GIB.items() if name in kind), None)
    if resources.gpus == 0 or have is None:
        return Check("memory", "ok", f"memory: about {_gib(need)} per process")
    if need > have:
        micro = max(1, int((config.compute.micro_batch or plan.batch_per_process) * have / need / 2))
        remedy = f"set compute.micro_batch={micro} (same result)"
        return Check("memory", "warning", f"memory: about {_gib(need)} per process, a {kind} has {have}; {remedy}")
    return Check("memory", "ok", f"memory: about {_gib(need)} per process of the {kind}'s {have}")


def version_checks() -> Iterator[Check]:
    """The packages that a job needs are installed, in the versions of requirements.txt."""
    pinned = {}
    if REQUIREMENTS.is_file():
        lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
        pinned = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    absent, other = [], []
    for package in _NEEDED:
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            if package == "faiss-gpu" and importlib.util.find_spec("faiss"):
                continue
            absent.append(package)
            continue
        if package in pinned and found.split("+")[0] != pinned[package].strip():
            other.append(f"{package} {found} (tested: {pinned[package].strip()})")
    if absent:
        yield Check("versions", "error", f"not installed here: {', '.join(absent)}; run `make install`")
    elif other:
        yield Check("versions", "warning", f"versions: {', '.join(other)}")
    else:
        yield Check("versions", "ok", "versions: as in requirements.txt")


def training_checks(config: PretrainConfig, plan: Plan) -> Iterator[Check]:
    """What a training would notice at its start only, or never say."""
    if config.monitor.wandb is not None and importlib.util.find_spec("wandb") is None:
        yield Check("wandb", "error", "monitor.wandb is set, but wandb is not installed: pip install wandb")
    if plan.samples is not None and config.batch_size > plan.samples:
        text = (
            f"batch_size={config.batch_size} is more than the {plan.samples} samples: batches hold some of them twice"
        )
        yield Check("batch_size", "warning", text)


def slurm_checks(resources: Resources) -> Iterator[Check]:
    """The partition offers what is asked for, as SLURM itself reports it."""
    cluster = resources.cluster
    try:
        found = slurm.partitions(cluster.partition)
    except UserError as error:
        yield Check("slurm", "error", str(error))
        return
    if not found:
        known = ", ".join(slurm.names_of_partitions())
        wanted = f"cluster.partition={cluster.partition}" if cluster.partition else "no default partition"
        yield Check("partition", "error", f"{wanted}: SLURM has no such partition; it has: {known}")
        return
    part = found[0]
    if not part.up:
        yield Check("partition", "error", f"partition {part.name} is down; choose another with cluster.partition=...")
    if part.time_min is not None and cluster.time_min > part.time_min:
        remedy = f"use cluster.time_min={part.time_min}: the run is requeued at the limit and goes on"
        yield Check(
            "time", "error", f"cluster.time_min={cluster.time_min}, {part.name} allows {part.time_min}; {remedy}"
        )
    if resources.gpus and cluster.gpu_type is not None and cluster.gpu_type not in part.gpus:
        offer = ", ".join(sorted(kind or "GPUs without a type" for kind in part.gpus)) or "no GPUs"
        yield Check("size", "error", f"cluster.gpu_type={cluster.gpu_type}, but partition {part.name} has {offer}")
    for key, asked, offered in _asked(resources, part):
        if asked > offered:
            yield Check("size", "error", f"{key}={asked}, but partition {part.name} has {offered}; ask for less")
    if cluster.signal_s >= cluster.time_min * 60:
        yield Check("time", "error", f"cluster.signal_s={cluster.signal_s} is longer than cluster.time_min; shorten it")
    limit = "no time limit" if part.time_min is None else f"limit {part.time_min} min"
    yield Check("partition", "ok", f"partition {part.name}: {part.nodes} nodes, {part.cpus} cores, {limit}")


def _asked(resources: Resources, part: slurm.Partition) -> list[tuple[str, int, int]]:
    cluster = resources.cluster
    most = max(part.gpus.values(), default=0)
    gpus = part.gpus.get(cluster.gpu_type, most) if cluster.gpu_type else most
    return [
        ("cluster.nodes", resources.nodes, part.nodes),
        ("cluster.gpus", resources.gpus, gpus),
        ("cores per node (cpus_per_process x processes)", (resources.cores or 1) * resources.processes, part.cpus),
        ("cluster.memory_gb", cluster.memory_gb or 0, part.memory_mb // 1000),
    ]


def gpu_checks(here: Resources) -> list[Check]:
    """No two processes of a training on one GPU: NCCL does not do that."""
    if here.processes <= here.gpus or here.gpus == 0:
        return []
    text = (
        f"cluster.processes={here.processes} would train on {here.gpus} GPU{'s' if here.gpus > 1 else ''} of a node, "
        f"which NCCL does not share: use cluster.processes={here.gpus}, or cluster.gpus=0 for the CPU"
    )
    return [Check("cluster.processes", "error", text)]


def norm_checks(config: PretrainConfig, plan: Plan) -> Iterator[Check]:
    """BatchNorm sees one process's chunk: with several of them the training would depend on their number."""
    model, several = config.model, plan.world_size > 1 or config.compute.micro_batch is not None
    if several and foreign.has_batch_norm(model.name, model.args):
        ours = " (model.args.batch_norm=false)" if model.name.startswith("akorn") else ""
        yield Check(
            "model", "error",
            f"model.name={model.name} has BatchNorm, whose result depends on the number of processes "
            f"({plan.world_size} here) and on compute.micro_batch\n       use one process without micro-batches, or a "
            f"model without BatchNorm{ours}",
        )  # fmt: skip


def checks(config: AnyJob, home: Path, chain: Sequence[Link], resources: dict[str, Resources]) -> list[Check]:
    """All checks of a launch but those of its data. Resources have been resolved before."""
    found = [*home_checks(config, home), *version_checks()]
    if isinstance(config, PretrainConfig):
        here = resources[chain[0].name]
        plan = plan_of(config, here)
        found.append(memory_check(config, plan, here))
        found += [*training_checks(config, plan), *norm_checks(config, plan), *gpu_checks(here)]
    for link in chain:
        if resources[link.name].executor == "slurm":
            found += [check for check in slurm_checks(resources[link.name]) if check not in found]
    return found


def missing_data(config: AnyJob) -> list[Check]:
    """What the job reads and is not there, as one check: the first with its remedy, the names of the others."""
    errors = [check for check in data_checks(config) if check.level == "error"]
    if not errors:
        return []
    names = list(dict.fromkeys(check.name for check in errors[1:]))
    finding, newline, remedy = errors[0].text.partition("\n")
    others = f" (missing as well: {', '.join(names)})" if names else ""
    return [Check(errors[0].name, "error", finding + others + newline + remedy)]


def stop_on_errors(found: Sequence[Check]) -> None:
    """Raise the errors among the checks as one `UserError`."""
    errors = [check.text for check in found if check.level == "error"]
    if errors:
        raise UserError("\n       ".join(errors))
