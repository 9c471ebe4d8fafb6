"""Where a Sudoku solver comes from: `--ckpt` as a run, an export, or a file of the published code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.errors import UserError
from downstream.backbone import refuse_arguments
from pretrain import kernels
from pretrain.distributed import own_device
from pretrain.export import exported
from pretrain.models.sudoku import SudokuNet
from pretrain.tasks.sudoku import make_model


@dataclass(frozen=True)
class Solver:
    """A network in evaluation mode, and what it is called in results."""

    net: SudokuNet
    name: str
    description: dict[str, Any]
    device: torch.device
    precision: str = "fp32"

    def autocast(self) -> torch.autocast:
        """The context in which the network runs."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @property
    def has_starts(self) -> bool:
        """Whether different starts give different answers: AKOrN, not the controls."""
        return self.net.kind == "akorn"


def load(
    ckpt: str, *, args: Mapping[str, Any] | None = None, device: str | None = None, precision: str = "fp32"
) -> Solver:
    """Read a solver.

    Args:
        ckpt: folder of a run (its export, or else its newest checkpoint) or of an export, or a published .pth file.
        args: architecture arguments of a published file, under their published names.
        precision: of matrix products, "fp32" or "bf16".

    Raises:
        UserError: there is no such thing, it is no Sudoku solver, or its weights do not fit.
    """
    path = Path(ckpt)
    where = own_device(device)
    refuse_arguments(path, args or {})
    if path.is_file():
        net, description = _published(path, dict(args or {}))
    elif path.is_dir():
        with exported(path) as folder:
            net, description = _exported(folder)
    else:
        raise UserError(f"no run, export or weights file {ckpt!r}; runs lie in runs/NAME")
    net = net.eval().requires_grad_(False).to(where)
    kernels.fastest(net)
    return Solver(net, path.resolve().name, description, where, precision)


def _exported(folder: Path) -> tuple[SudokuNet, dict[str, Any]]:
    """A folder with config.json and model.safetensors."""
    from safetensors.torch import load_file

    described = json.loads((folder / "config.json").read_text())
    name, arguments = described.get("architecture", ""), described.get("model_args", {})
    if described.get("task") != "sudoku":
        raise UserError(f"{folder} holds {name or 'an unknown model'}, which solves no Sudoku")
    net = make_model(name, arguments)
    try:
        net.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{folder}: {str(error).splitlines()[-1].strip()}") from error
    return net, {"architecture": name, "model_args": arguments}


def _published(path: Path, arguments: dict[str, Any]) -> tuple[SudokuNet, dict[str, Any]]:
    """A checkpoint of the published code."""
    from pretrain.models.reference import load_published

    try:
        published = load_published(path, arguments)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    if not isinstance(published.model, SudokuNet):
        raise UserError(f"{path} holds {published.kind}, which solves no Sudoku")
    return published.model, {"architecture": published.kind, "model_args": published.arguments}
