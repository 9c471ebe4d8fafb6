"""Checks golden files: recorded inputs and outputs of the published code against this project.

    python tests/golden.py FILE.safetensors ...

Prints the largest relative error of every recorded output and returns 1 where one is above tolerance, or a tensor is
missing, unknown or of another shape. Format: a safetensors file whose metadata key `config` is a JSON object with
`kind` and arguments under their published names; `state.*` is the published state dict. Tolerance, relative to the
largest absolute value of each tensor: 1e-5, energies and gradients 1e-4, in fp32 eager on the CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs.errors import UserError, run

TOLERANCE = 1e-5
LOOSE_TOLERANCE = 1e-4  # energies and gradients
Outputs = dict[str, Tensor]


@dataclass
class Golden:
    """One file: its arguments, its tensors, and which of them were read."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    used: set[str] = field(default_factory=set)

    @property
    def kind(self) -> str:
        return self.config["kind"]

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments under their published names."""
        return {key: value for key, value in self.config.items() if key not in ("kind", "note")}

    def take(self, name: str) -> Tensor:
        self.used.add(name)
        if name not in self.tensors:
            raise ValueError(f"missing tensor {name}")
        return self.tensors[name]

    def state(self) -> Outputs:
        """The published state dict."""
        names = [name for name in self.tensors if name.startswith("state.")]
        self.used.update(names)
        return {name.removeprefix("state."): self.tensors[name] for name in names}


def read(path: Path) -> Golden:
    """Raises UserError for what is no golden file."""
    try:
        with safe_open(path, "pt") as file:
            config = json.loads((file.metadata() or {})["config"])
            return Golden(config, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
        raise UserError(f"{path} is no golden file (safetensors with a JSON `config`): {error}") from None


def published_map(c: Tensor, n: int) -> Tensor:
    """Our map [B, C, h, w] in (n, K) order as the published (K, n)."""
    return c.unflatten(1, (n, -1)).transpose(1, 2).flatten(1, 2)


def normalised(golden: Golden) -> Tensor:
    """Images in [0, 1] -> (images - .5) / .5, with a gradient at the images."""
    return (golden.take("images").float().requires_grad_() - 0.5) / 0.5


def of_akorn(golden: Golden) -> Outputs:
    from pretrain.models.oscillators import oscillators_of
    from pretrain.models.reference import convert

    found = convert(golden.state(), golden.arguments, kind="akorn")
    model: Any = found.model
    images, start, n = normalised(golden), golden.take("initial_oscillators"), found.arguments["n"]
    assert found.projector is not None
    output = found.projector(model(images, start))
    (gradient,) = torch.autograd.grad(output.square().sum(), golden.take("images"))
    seen = model.forward_oscillators(images, start, energy=True, trajectory=True)
    outputs = {"output": output, "image_gradient_of_sum_square": gradient}
    outputs["readout"] = published_map(seen.readout[-1], n)
    for i, (grid, x, trajectory) in enumerate(zip(seen.grids, seen.oscillators, seen.trajectory, strict=True)):
        outputs[f"layer{i}.oscillators_step1"] = oscillators_of(trajectory[1], n, grid)
        outputs[f"layer{i}.oscillators_final"] = oscillators_of(x, n, grid)
        outputs[f"layer{i}.energy"] = seen.energy[i]
    return outputs


def of_itrsa(golden: Golden) -> Outputs:
    from pretrain.models.reference import convert

    found = convert(golden.state(), golden.arguments, kind="itrsa")
    model: Any = found.model
    images = normalised(golden)
    assert found.projector is not None
    _, levels = model.forward_intermediates(images, indices=1)
    return {"features": levels[0], "output": found.projector(model(images))}


def of_sudoku(golden: Golden) -> Outputs:
    from pretrain.models.oscillators import oscillators_of
    from pretrain.models.reference import convert

    golden.take("state.x0")  # used by nothing, but part of every published state dict
    found = convert(golden.state(), golden.arguments, kind="sudoku_akorn")
    model: Any = found.model
    puzzle, given = golden.take("puzzle_onehot").flatten(1, 2), golden.take("given").flatten(1)
    if not bool(((puzzle == 0) | (puzzle == 1)).all()) or bool((puzzle.sum(-1) > 1).any()):
        raise ValueError("puzzle_onehot has entries other than 0 and 1, or several digits in a cell")
    if not bool(((given == 0) | (given == 1)).all()):
        raise ValueError("given has entries other than 0 and 1")
    digits = (puzzle * torch.arange(1, 10)).sum(-1)
    seen = model.forward_oscillators(digits, golden.take("noise"), energy=True, given=given.bool())
    return {
        "logits": seen.logits.unflatten(1, (9, 9)),
        "energy": seen.energy[-1],
        "oscillators_final": oscillators_of(seen.oscillators[-1], model.n, (9, 9)),
    }


def of_classifier(golden: Golden) -> Outputs:
    from pretrain.models.reference import convert

    state = golden.state()
    for name in state:
        if name.endswith("running_mean"):
            golden.take(f"state.{name.replace('running_mean', 'num_batches_tracked')}")
    model: Any = convert(state, golden.arguments, kind="classifier_akorn").model
    images, start = normalised(golden), golden.take("initial_oscillators")
    model.set_input_size(tuple(images.shape[2:]))
    seen = model.forward_oscillators(images, start, energy=True)
    return {"logits": model(images, start), **{f"layer{i}.energy": energy for i, energy in enumerate(seen.energy)}}


def of_simclr(golden: Golden) -> Outputs:
    from pretrain.tasks.nt_xent import nt_xent

    views = [golden.take(f"view{i}").float().requires_grad_() for i in range(2)]
    loss, _ = nt_xent(torch.stack(views, dim=1), temperature=golden.config["temperature"])
    gradients = torch.autograd.grad(loss, views)
    return {"loss": loss.reshape(1), "grad0": gradients[0], "grad1": gradients[1]}


def of_metrics(golden: Golden) -> Outputs:
    from downstream.metrics import score

    scores = score(golden.take("ground_truth"), golden.take("prediction"))
    # Where ours are undefined (no object), the published code says 1 and -1.
    return {"fg_ari": scores["fg_ari"].nan_to_num(1.0), "mbo": scores["mbo_i"].nan_to_num(-1.0)}


def of_agglomerative(golden: Golden) -> Outputs:
    from downstream.grouping import Grouping, group

    features = golden.take("features")
    if float((features.norm(dim=1) - 1).abs().max()) > TOLERANCE:
        raise ValueError("features are not of unit length over channels")
    grouping = Grouping(
        method="linkage", clusters=golden.config["clusters"], components=golden.config["pca_components"]
    )
    return {"labels": renamed(group(features, grouping)[0], golden.take("labels"))}


def renamed(labels: Tensor, recorded: Tensor) -> Tensor:
    """Labels under the recorded names: each takes the name that most of its tokens have; names are used once."""
    result, free = torch.full_like(recorded, -1), set(recorded.unique().tolist())
    for label in labels.unique().tolist():
        inside = labels == label
        names, counts = recorded[inside].unique(return_counts=True)
        name = int(names[counts.argmax()])
        if name in free:
            free.remove(name)
            result[inside] = name
    return result


def of_up_tiling(golden: Golden) -> Outputs:
    from downstream.tiling import shifted_crops

    arguments = golden.arguments
    return {"shifted": shifted_crops(golden.take("image"), patch=arguments["patch_size"], factor=arguments["factor"])}


KINDS: dict[str, Callable[[Golden], Outputs]] = {
    "akorn": of_akorn,
    "itrsa": of_itrsa,
    "sudoku_akorn": of_sudoku,
    "classifier_akorn": of_classifier,
    "simclr": of_simclr,
    "metrics": of_metrics,
    "agglomerative_average": of_agglomerative,
    "up_tiling": of_up_tiling,
}


def tolerance_of(name: str) -> float:
    """Largest relative error allowed of a recorded tensor."""
    return LOOSE_TOLERANCE if "energy" in name or "grad" in name else TOLERANCE


def relative_error(output: Tensor, recorded: Tensor) -> float:
    """Largest absolute error over the largest absolute recorded value; infinite for other shapes or NaN."""
    if output.shape != recorded.shape or not bool(recorded.isfinite().all()):
        return float("inf")
    error = float((output.detach().double() - recorded.double()).abs().max())
    scale = float(recorded.double().abs().max())
    return float("inf") if error != error else error / scale if scale > 0 else error


def check(path: Path) -> dict[str, float]:
    """Relative error of every recorded output. Raises ValueError naming what is missing, unknown or does not fit."""
    golden = read(path)
    if golden.config.get("kind") not in KINDS:
        raise ValueError(f"kind {golden.config.get('kind')!r} is unknown; known: {', '.join(KINDS)}")
    outputs = KINDS[golden.kind](golden)
    errors = {name: relative_error(output, golden.take(name)) for name, output in outputs.items()}
    extra = sorted(set(golden.tensors) - golden.used)
    if extra:
        raise ValueError(f"unknown tensor {', '.join(extra)}")
    return errors


def lines(path: Path) -> Iterable[tuple[bool, str]]:
    """Verdicts on one file: (good, line to print)."""
    try:
        errors = check(path)
    except UserError:
        raise
    except (ValueError, KeyError, RuntimeError) as error:
        yield False, f"FAIL {path.name}: {error}"
        return
    for name, value in errors.items():
        good = value <= tolerance_of(name)
        yield good, f"{'ok  ' if good else 'FAIL'} {path.name} {name} {value:.1e} (at most {tolerance_of(name):.0e})"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="check golden files of the published code")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    all_good = True
    for path in parser.parse_args(argv).files:
        for good, line in lines(path):
            print(line)
            all_good &= good
    return 0 if all_good else 1


if __name__ == "__main__":
    raise SystemExit(run(main))
