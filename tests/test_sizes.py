"""Parameters and FLOPs: against the formula, and against what docs/models.md says."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.models.registry import MODELS
from pretrain.models.sizes import HEADER, cost, main, row

DOCUMENT = (Path(__file__).resolve().parents[1] / "docs" / "models.md").read_text()
QUICK = ["akorn_nano_patch4_32", "akorn_tiny_patch16_256", "akorn_conv_nano_patch4_64", "itrsa_clevrtex_l2_patch8_128"]


@pytest.mark.parametrize(("name", "C", "L", "N", "patch"), [
    ("akorn_nano_patch4_32", 128, 1, 64, 4), ("akorn_clevrtex_l2_patch8_128", 256, 2, 256, 8),
    ("akorn_large_patch16_256", 1024, 4, 256, 16),
])  # fmt: skip
def test_flops_follow_the_formula(name: str, C: int, L: int, N: int, patch: int) -> None:
    """L T (8 N C^2 + 4 N^2 C) + L N 2 n C^2 + the patches, with T = 8 and n = 4."""
    expected = L * 8 * (8 * N * C**2 + 4 * N**2 * C) + L * N * 2 * 4 * C**2 + 2 * N * C * 3 * patch**2
    assert cost(name).flops == expected


def test_parameters_follow_the_formula() -> None:
    C, N, H = 128, 64, 8
    matrices = 3 * C * C + C * C + 4 * C * C + 3 * 16 * C
    biases = 3 * C + C + 4 * C + C + C
    gta = 4 * 4 * N * (C // H // 2)
    assert cost("akorn_nano_patch4_32").parameters == matrices + biases + gta


@pytest.mark.parametrize("name", [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(MODELS)
])  # fmt: skip
def test_the_document_says_what_the_command_prints(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert row(name) in DOCUMENT.splitlines()
    assert main([name]) == 0
    assert capsys.readouterr().out.splitlines()[: len(HEADER)] == list(HEADER)


def test_the_document_names_every_model_and_no_other() -> None:
    named = [line.split("|")[1].strip() for line in DOCUMENT.splitlines() if line.startswith(("| akorn", "| itrsa"))]
    assert sorted(named) == sorted(MODELS)
