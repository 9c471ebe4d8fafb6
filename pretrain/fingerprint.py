"""A fingerprint of a model: its features of one fixed input, kept beside exported weights.

Owns: the input, how close two fingerprints must be, and the check that loaded weights are those that were exported:
weights that silently were not loaded are the usual cause of scores near chance.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import UserError

FILE = "fingerprint.json"
TOLERANCE = 1e-3  # of the features' norm: kernels of different devices round differently


def fixed_input(shape: list[int]) -> Tensor:
    """A smooth pattern in [-1, 1], fp32, the same on every machine: [1, 3, H, W] (or any shape)."""
    count = math.prod(shape)
    return torch.sin(torch.arange(count, dtype=torch.float64) * 0.37).float().reshape(shape)


@torch.no_grad()
def take(model: nn.Module, shape: list[int]) -> dict[str, Any]:
    """Features of the fixed input, as JSON holds them: in evaluation mode, fp32, on the CPU."""
    was_training = model.training
    features = model.eval()(fixed_input(shape)).flatten().double()
    model.train(was_training)
    return {"input_shape": shape, "features": [round(value, 7) for value in features.tolist()]}


def check(model: nn.Module, folder: Path) -> None:
    """Compare a model on the CPU with the fingerprint in an export folder.

    Raises:
        UserError: it gives other features than when it was exported; FileNotFoundError: there is no fingerprint.
    """
    recorded = json.loads((folder / FILE).read_text())
    expected = torch.tensor(recorded["features"], dtype=torch.float64)
    found = torch.tensor(take(model, recorded["input_shape"])["features"], dtype=torch.float64)
    close = found.shape == expected.shape and bool((found - expected).norm() <= TOLERANCE * expected.norm())
    if not close:  # nor where one of them is not finite
        raise UserError(
            f"the model does not give the features recorded in {folder / FILE}: its weights were not loaded "
            "(pretrained=True is needed) or belong to another export"
        )
