"""Which way of computing the K-layers is fastest here: measured once, recorded in the run, used again on resume.

    plain     PyTorch's own operations (kuramoto.py), on every device
    compiled  the same, fused by torch.compile: all steps of a layer as one (one by one where they are recomputed)
    graphed   the same, launched as CUDA graphs: small models wait for launches and little else
    native    klayer.cpp, on CPUs with AVX-512 (products in bf16 if it has instructions for them): all steps of an
              AKOrN in one call; of ItrSA and of what the kernel knows no update for the attention of a step. The
              readouts go with their layers

All compute the same up to float rounding. Only rank 0 measures; the others do as it says, so that no two ranks differ.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import Compute
from pretrain import fusing
from pretrain.distributed import Ranks, broadcast_json
from pretrain.models.connectivity import AttentionCoupling, Coupling, Grid
from pretrain.models.kernels import build
from pretrain.models.kuramoto import KuramotoLayer, Readout, allow_variants
from pretrain.native import find_compiler

Layer = KuramotoLayer | AttentionCoupling
# {"layer", "dtype", "device": what it holds for; "kernel"; "ms": {kernel: milliseconds forward and backward}; "note"}
Row = dict[str, Any]
RECORD = "kernels.json"
BATCH = 4  # or an image a thread: no core idles in the native kernel
WARM_UP = {"cpu": 1, "cuda": 4}  # a CUDA graph is compiled, run, recorded, and only then replayed
REPEATS = {"cpu": 3, "cuda": 10}
PATIENCE_MS = 300  # calls that took as long together are not repeated: they would delay every start


def set_up(backbone: nn.Module, compute: Compute, ranks: Ranks, run_dir: Path, *, images: int) -> list[Row]:
    """Choose (or take from `run_dir`), record, and set on the layers of a backbone; the rows of the table.

    Collective: every rank calls it, after the backbone is on its device. `images` (views) go through at once. Layers of
    models that are not ours are compiled by torch on GPUs and left alone on CPUs.
    """
    model: Any = backbone
    if compute.recompute:
        model.set_grad_checkpointing(True)
    rows: list[Row] = []
    if ranks.first:
        record = run_dir / RECORD
        rows = choose(backbone, compute, ranks.device, images=images, recorded=read(record))
        if rows:
            partial = record.with_suffix(".partial")
            partial.write_text(json.dumps(rows, indent=1) + "\n")
            partial.replace(record)  # a life killed here must not leave half a table to the next
        for note in dict.fromkeys(row["note"] for row in rows if row["note"]):
            print(note, file=sys.stderr)
    rows = broadcast_json(rows, ranks)
    apply(backbone, rows)
    fusing.allow(compute.compile)
    wanted = compute.compile and compute.zero_stage < 3  # torch would compile DeepSpeed's hooks, anew at many a step
    if wanted and ranks.device.type == "cuda" and find_compiler() is not None:
        allow_variants()
        for module in _compilable(backbone):
            module.compile(dynamic=False)
    return rows


def read(record: Path) -> list[Row]:
    """The table of an earlier life of the run; empty without one."""
    return json.loads(record.read_text()) if record.exists() else []


def fastest(backbone: nn.Module) -> None:
    """For inference: the native kernel where it runs, without measuring. Layers it does not take stay plain."""
    for module in backbone.modules():
        if isinstance(module, KuramotoLayer | Readout | Coupling):
            module.kernel = "native"


def choose(
    backbone: nn.Module, compute: Compute, device: torch.device, *, images: int = 64, recorded: Sequence[Row] = ()
) -> list[Row]:
    """One row per kind of layer. Kinds in `recorded` are not measured again while their kernel can still run."""
    dtype = torch.bfloat16 if compute.precision == "bf16" else torch.float32
    layers = layers_of(backbone)
    kinds = {shape_of(layer, grid): (layer, grid) for layer, grid in zip(layers, grids_of(backbone, layers))}
    known = {(row["layer"], row["dtype"], row["device"]): row for row in recorded}
    where = str(dtype).removeprefix("torch."), _name(device)
    rows = []
    for kind, (layer, grid) in kinds.items():
        candidates, note = available(layer, compute, dtype, device)
        row: Row = {"layer": kind, "dtype": where[0], "device": where[1], "kernel": "plain", "ms": {}, "note": note}
        earlier = known.get((kind, *where))
        if compute.kernel != "auto":
            row["kernel"] = _forced(kind, compute.kernel, candidates, note)
        elif earlier is not None and earlier["kernel"] in candidates:
            row |= {"kernel": earlier["kernel"], "ms": earlier["ms"]}
        elif len(candidates) > 1:
            # On CUDA code is compiled for the size of the batch, once; on the CPU a few images tell. Graphs are the
            # compiled code launched at once: the two are not held against each other, compiling takes long.
            size = images if device.type == "cuda" else max(BATCH, torch.get_num_threads())
            worth = [name for name in candidates if name != "compiled" or "graphed" not in candidates]
            row["ms"] = {name: measure(layer, name, grid, dtype, device, size) for name in worth}
            row["kernel"] = min(worth, key=row["ms"].__getitem__)
        rows.append(row)
    return rows


def apply(backbone: nn.Module, rows: Sequence[Row]) -> None:
    """Set the kernel of every K-layer as the table says, and of all readouts: native where a layer's is."""
    chosen = {row["layer"]: row["kernel"] for row in rows}
    for module in backbone.modules():
        if isinstance(module, Readout):
            module.kernel = "native" if "native" in chosen.values() else "plain"
    layers = layers_of(backbone)
    for layer, grid in zip(layers, grids_of(backbone, layers)):
        layer.kernel = _coupling(layer).kernel = chosen[shape_of(layer, grid)]


def layers_of(backbone: nn.Module) -> list[Layer]:
    """K-layers, and attention outside of them (ItrSA's)."""
    layers = [module for module in backbone.modules() if isinstance(module, KuramotoLayer)]
    inside = {layer.coupling for layer in layers}
    return [*layers, *(m for m in backbone.modules() if isinstance(m, AttentionCoupling) and m not in inside)]


def grids_of(backbone: nn.Module, layers: Sequence[Layer]) -> list[Grid]:
    """Tokens (rows, columns) that each of the layers works on."""
    grids: list[Grid] | None = getattr(backbone, "grids", None)
    return grids or [getattr(backbone, "grid", (8, 8))] * len(layers)


def shape_of(layer: Layer, grid: Grid) -> str:
    """What layers of equal speed share."""
    coupling = _coupling(layer)
    oscillators = f" n {layer.n}" if isinstance(layer, KuramotoLayer) else ""
    heads = f" heads {coupling.num_heads}" if isinstance(coupling, AttentionCoupling) else ""
    steps = f" T {layer.num_steps}" if isinstance(layer, KuramotoLayer) else ""
    return f"{type(coupling).__name__} C {layer.dim}{oscillators}{heads} tokens {grid[0]}x{grid[1]}{steps}"


def _coupling(layer: Layer) -> Coupling:
    return layer.coupling if isinstance(layer, KuramotoLayer) else layer


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def available(layer: Layer, compute: Compute, dtype: torch.dtype, device: torch.device) -> tuple[list[str], str]:
    """Kernels that can run this layer here, and one line about what cannot though it would be faster ("" for none)."""
    names, note = ["plain"], ""
    if device.type == "cpu":
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            if _coupling(layer).runs_natively(torch.empty(1, 1, layer.dim)):
                return ["plain", "native"], ""
        if isinstance(_coupling(layer), AttentionCoupling):
            note = build.library().reason
    if isinstance(layer, AttentionCoupling):
        return names, note
    if compute.zero_stage == 3:  # DeepSpeed's hooks break the code at every module
        return names, note
    if compute.compile and find_compiler() is not None:
        names.append("compiled")
        if device.type == "cuda" and _can_graph(compute):
            names.append("graphed")
    elif compute.compile and not note:
        note = "no C++ compiler found: torch.compile is left out, steps are slower"
    return names, note


def _can_graph(compute: Compute) -> bool:
    """CUDA graphs read parameters where they were recorded, and keep gradients only until the next forward.

    ZeRO 1 and 2 may keep to that as well; nobody has tried.
    """
    return compute.zero_stage == 0 and compute.micro_batch is None and not compute.recompute


def _forced(kind: str, kernel: str, candidates: Sequence[str], note: str) -> str:
    if kernel in candidates or (kernel == "compiled" and find_compiler() is not None):
        return kernel
    if kernel == "graphed":
        note = "graphs need a GPU, a C++ compiler, compute.zero_stage=0, and neither micro_batch nor recompute"
    raise UserError(f"compute.kernel={kernel}: {note or f'it does not take {kind}'}; set compute.kernel=auto")


def measure(layer: Layer, kernel: str, grid: Grid, dtype: torch.dtype, device: torch.device, images: int) -> float:
    """Milliseconds of forward and backward: the best of a few, after warming up (device syncs)."""
    generator = torch.Generator().manual_seed(0)
    shape = (images, grid[0] * grid[1], layer.dim)
    x, c = (torch.randn(shape, generator=generator).to(device).requires_grad_() for _ in range(2))
    parameters = [x, c, *(p for p in layer.parameters() if p.requires_grad)]
    coupling, before = _coupling(layer), layer.kernel
    layer.kernel = coupling.kernel = kernel
    times: list[float] = []
    try:
        for _ in range(WARM_UP[device.type]):
            _timed_ms(layer, x, c, grid, parameters, dtype)
        while len(times) < REPEATS[device.type] and sum(times) <= PATIENCE_MS:
            times.append(_timed_ms(layer, x, c, grid, parameters, dtype))
    except torch.OutOfMemoryError:
        return float("inf")
    finally:
        layer.kernel = coupling.kernel = before
    return round(min(times), 3)


def _timed_ms(
    layer: Layer, x: Tensor, c: Tensor, grid: Grid, parameters: Sequence[Tensor], dtype: torch.dtype
) -> float:  # fmt: skip
    """Milliseconds of one forward and backward (device syncs)."""
    _wait(x.device)
    start = time.perf_counter()
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        y = layer(x, c, grid) if isinstance(layer, KuramotoLayer) else layer(x, grid, layer.positions(grid))
    torch.autograd.grad(y.square().sum(), parameters, allow_unused=True)
    _wait(x.device)
    return (time.perf_counter() - start) * 1000


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _compilable(backbone: nn.Module) -> list[Any]:
    """Readouts of ours, blocks of others."""
    blocks = getattr(backbone, "blocks", None)
    if not isinstance(blocks, nn.ModuleList | nn.Sequential):
        return []
    return [block.readout if isinstance(getattr(block, "readout", None), nn.Module) else block for block in blocks]
