"""What a life of a run starts from: decided by what lies in the run's folder, never by a flag.

Owns: finding the newest whole checkpoint (damaged ones are put aside, loudly), the check that the configuration still
describes the same training, and `init_from` of a new run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor, nn

from configs.changes import check_resume
from configs.errors import UserError
from configs.schema import PretrainConfig
from pretrain import checkpoint
from pretrain.checkpoint import Snapshot
from pretrain.distributed import Ranks, broadcast_json
from pretrain.tensorfile import read_tensors

Report = Callable[..., None]


def find(run_dir: Path, ranks: Ranks, report: Report) -> Snapshot | None:
    """Return the newest whole training state of a run, or None for a new run (collective).

    Rank 0 verifies, and renames what is damaged to `damaged_step_*`, so that it is neither used nor removed.
    """
    found = None
    if ranks.first:
        checkpoint.remove_leftovers(run_dir)
        damaged: list[str] = []

        def put_aside(path: Path, reason: str) -> None:
            aside = path.with_name(f"damaged_{path.name}")
            while aside.exists():
                aside = aside.with_name(f"{aside.name}x")
            path.rename(aside)
            damaged.append(path.name)
            report("damaged", path=str(aside), reason=reason)

        path = checkpoint.newest(run_dir, report=put_aside)
        if damaged:
            report("fallback", to=path.name if path else "the beginning of the run: no checkpoint is whole")
        found = None if path is None else str(path)
    found = broadcast_json(found, ranks)
    return None if found is None else checkpoint.load(Path(found))


def check_config(snapshot: Snapshot, config: PretrainConfig, run_dir: Path, report: Report) -> None:
    """Refuse a configuration that describes another training than the one begun; note what has changed otherwise."""
    try:
        begun = PretrainConfig.model_validate_json(json.dumps(snapshot.state["config"]))
    except ValidationError as error:
        report("config_changed", reason=f"the configuration in the checkpoint is of another version: {error}")
        return
    changed = check_resume(begun, config, str(run_dir))
    if changed:
        report("config_changed", changes="; ".join(map(str, changed)))


def check_data(snapshot: Snapshot, fingerprint: str) -> None:
    """Refuse another set of samples than the one begun with: positions in the stream would mean other images."""
    begun = snapshot.state.get("data_fingerprint")
    if begun is not None and begun != fingerprint:
        raise UserError(
            f"the shards are no longer those that this run began with (fingerprint {fingerprint}, then {begun}); "
            "put the old ones back, or start a new run with init_from"
        )


def load_weights(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Load whole weights strictly.

    Raises:
        UserError: names or shapes differ; says which.
    """
    try:
        module.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise UserError(f"the weights in {source} do not fit the model: {_first_lines(error)}") from error


def initialise_from(source: str, module: nn.Module, backbone: nn.Module) -> str:
    """Load the weights that a new run starts from: of a run or checkpoint (averaged, all of the module if it fits,
    else the backbone), or of an export (backbone). Returns what was loaded.

    Raises:
        UserError: nothing usable lies there.
    """
    path = Path(source)
    export = next((p for p in (path / "model.safetensors", path) if p.suffix == ".safetensors" and p.is_file()), None)
    if export is not None:
        load_weights(backbone, read_tensors(export), source)
        return "backbone"
    found = path if checkpoint.is_checkpoint(path) else checkpoint.newest(path)
    if found is None or checkpoint.damage(found) is not None:
        raise UserError(f"init_from={source}: no whole checkpoint and no model.safetensors there")
    tensors = checkpoint.load(found).tensors
    weights = tensors.get("ema", tensors["weights"])
    own = module.state_dict()
    if weights.keys() == own.keys() and all(weights[name].shape == own[name].shape for name in own):
        load_weights(module, weights, source)
        return "whole model"
    load_weights(backbone, part_of(weights, prefix_of(module, backbone)), source)
    return "backbone"


def prefix_of(module: nn.Module, part: nn.Module) -> str:
    """The prefix of a submodule's names in its module's: "backbone.", or "" where the two are one."""
    name = next(name for name, child in module.named_modules() if child is part)
    return f"{name}." if name else ""


def part_of(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _first_lines(error: Any) -> str:
    """The first lines of torch's message, which names every key: of each line as much as one reads."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(line if len(line) <= 160 else line[:157] + "..." for line in lines[:4])
