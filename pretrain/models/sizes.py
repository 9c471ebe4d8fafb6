"""Parameters and FLOPs of every model of this project.

    python -m pretrain.models.sizes [NAME ...]

prints the table of docs/models.md. Parameters are the backbone's, without classifier; FLOPs (2 per multiply-add) are
counted operation by operation on a forward of one image at the model's own size: matrix products, convolutions and
attention, not the elementwise work.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.models.registry import MODELS


@dataclass(frozen=True)
class Cost:
    """Of one model: parameters without the classifier, FLOPs of one forward of one image."""

    parameters: int
    flops: int


def cost(name: str, **kwargs: Any) -> Cost:
    """Count on the meta device: no weights are made, nothing is computed. `kwargs`: as for timm.create_model."""
    with torch.device("meta"):
        model: Any = timm.create_model(name, num_classes=0, **kwargs).eval()
        images = torch.empty(1, *model.default_cfg["input_size"])
        with FlopCounterMode(display=False) as counter:
            if hasattr(model, "start_shape"):
                model(images, torch.empty(1, *model.start_shape()))
            else:
                model(images)
    return Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops())


def row(name: str) -> str:
    """One line of the table."""
    (constructor, given), found = MODELS[name], cost(name)
    defaults = {key: p.default for key, p in inspect.signature(constructor).parameters.items()}
    size = {"patch_size": 1, "coupling": "attn", **defaults, **given}
    heads = size["num_heads"] if "attn" in size["coupling"] else "-"
    shape = f"{size['img_size']} | {size['patch_size']} | {size['embed_dim']} | {size['depth']} | {heads} | "
    shape += str(size["num_steps"])
    return f"| {name} | {shape} | {found.parameters / 1e6:.2f} M | {found.flops / 1e9:.2f} |"


HEADER = (
    "| name | input | patch | C | L | heads | T | parameters | GFLOP per forward |",
    "|---|---|---|---|---|---|---|---|---|",
)


def table(names: Sequence[str] = ()) -> str:
    """The table of docs/models.md, in Markdown."""
    return "\n".join([*HEADER, *(row(name) for name in names or sorted(MODELS))])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="parameters and FLOPs of this project's models")
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    names = parser.parse_args(argv).names
    unknown = sorted(set(names) - set(MODELS))
    if unknown:
        parser.error(f"no model named {', '.join(unknown)}; docs/models.md lists them")
    print(table(names))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
