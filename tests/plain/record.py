"""Writes golden files in the documented format, made by the plain transcription on random weights and inputs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.plain.models import AKOrN, Classifier, ItrSA, Sudoku

MODELS = {"akorn": AKOrN, "itrsa": ItrSA, "sudoku_akorn": Sudoku, "classifier_akorn": Classifier}


def randomise(model: nn.Module) -> None:
    """Every tensor of the state random, of a size that keeps activations of order one."""
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or name.endswith("x0"):
            continue
        noise = torch.randn_like(tensor)
        if name.endswith("gamma") and tensor.numel() == 1:
            continue
        if "mat_" in name:
            tensor += 0.2 * noise
        elif name.endswith("running_var"):
            tensor.copy_(1 + 0.2 * noise.abs())
        elif tensor.ndim >= 2 and not name.startswith(("pemb", "pos_embed")) and "omg" not in name:
            tensor.copy_(noise / math.sqrt(max(tensor[0].numel(), 1)))
        elif name.endswith(("norm.weight", "scale")) or (name.endswith("weight") and tensor.ndim == 1):
            tensor.copy_(1 + 0.3 * noise)
        else:
            tensor.copy_(0.3 * noise)


def inputs_of(kind: str, arguments: dict[str, Any], size: tuple[int, int], count: int) -> dict[str, Tensor]:
    """Random inputs of a model, under their recorded names."""
    if kind == "sudoku_akorn":
        given = torch.rand(count, 9, 9, 1) < 0.4
        puzzle = nn.functional.one_hot(torch.randint(0, 9, (count, 9, 9)), 9) * given
        shape = (count, arguments["ch"] // arguments["n"], arguments["n"], 9, 9)
        return {"puzzle_onehot": puzzle, "given": given.int(), "noise": torch.randn(shape)}
    images = torch.rand(count, 3, *size)
    if kind == "itrsa":
        return {"images": images}
    patch, side = arguments.get("psize", 1), arguments.get("imsize")
    grid = (side // patch,) * 2 if arguments.get("autorescale", True) and side else (size[0] // patch, size[1] // patch)
    start = torch.randn(count, arguments["ch"] // arguments["n"], arguments["n"], *grid)
    return {"images": images, "initial_oscillators": start}


def record(
    path: Path, kind: str, arguments: dict[str, Any], *, size: tuple[int, int] = (16, 16), count: int = 2, seed: int = 0
) -> Path:
    """Write one golden file. `size`: of the images; `count`: of the batch."""
    torch.manual_seed(seed)
    model = MODELS[kind](**arguments).eval()
    with torch.no_grad():
        randomise(model)
    inputs = inputs_of(kind, arguments, size, count)
    if kind == "akorn":
        inputs["images"].requires_grad_()
        outputs = model(**{"images": inputs["images"], "start": inputs["initial_oscillators"]})
        (gradient,) = torch.autograd.grad(outputs["output"].square().sum(), inputs["images"])
        outputs["image_gradient_of_sum_square"] = gradient
    else:
        with torch.no_grad():
            outputs = model(*inputs.values())
    state = {f"state.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in {**state, **inputs, **outputs}.items()}
    save_file(tensors, path, metadata={"config": json.dumps({"kind": kind, **arguments})})
    return path
