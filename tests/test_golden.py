"""The golden check itself: files made by the plain transcription pass, altered ones do not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests import golden
from tests.plain.record import record

SHARED = Path(os.environ.get("AKORN_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "golden"

AKORN = {"n": 4, "ch": 32, "L": 1, "T": 4, "psize": 4, "imsize": 16, "J": "attn", "gta": True, "heads": 4}
SUDOKU = {"n": 4, "ch": 32, "L": 1, "T": 16, "heads": 4}
CLASSIFIER = {"n": 2, "ch": 4, "out_classes": 10, "L": 3, "T": 2, "ksizes": [9, 7, 5]}

CASES = {
    "n8": ("akorn", {**AKORN, "n": 8, "ch": 64}, (16, 16)),
    "mixed_l3": (
        "akorn",
        {**AKORN, "L": 3, "T": [2, 3, 1], "J": ["conv", "attn", "attn"], "ksize": [3, 1, 1], "c_norm": "sandb"},
        (16, 16),
    ),
    "mixed_l3_abspos": (
        "akorn",
        {**AKORN, "L": 3, "T": [1, 2, 3], "J": ["attn", "conv", "conv"], "ksize": [1, 5, 3], "gta": False},
        (16, 16),
    ),
    "no_projection": ("akorn", {**AKORN, "project": False, "gamma": 0.5}, (16, 16)),
    "gamma_omega": ("akorn", {**AKORN, "gamma": 0.5, "use_omega": True, "init_omg": 0.3, "n": 2}, (16, 16)),
    "non_square": ("akorn", {**AKORN, "autorescale": False, "L": 2, "c_norm": "none"}, (24, 12)),
    "non_square_abspos": ("akorn", {**AKORN, "autorescale": False, "gta": False}, (12, 20)),
    "rescaled": ("akorn", {**AKORN, "L": 2, "T": 2, "use_ro_x": True}, (24, 20)),
    "one_head": ("akorn", {**AKORN, "heads": 1}, (16, 16)),
    "sixteen_heads": ("akorn", {**AKORN, "heads": 16, "maxpool": False}, (16, 16)),
    "conv_wide": ("akorn", {**AKORN, "J": "conv", "ksize": 7, "gta": False, "T": 6}, (16, 16)),
    "conv_no_positions": ("akorn", {**AKORN, "J": "conv", "ksize": 5}, (16, 16)),
    "deep_steps": ("akorn", {**AKORN, "L": 2, "T": 16}, (16, 16)),
    "itrsa": ("itrsa", {"imsize": 16, "psize": 4, "ch": 32, "blocks": 2, "heads": 8, "mlp_dim": 48, "T": 3,
                        "gta": True}, (16, 16)),
    "vit_abspos": ("itrsa", {"imsize": 16, "psize": 2, "ch": 32, "blocks": 3, "heads": 2, "mlp_dim": 128, "T": 1,
                             "gta": False}, (16, 16)),
    "sudoku_t16": ("sudoku_akorn", SUDOKU, (9, 9)),
    "sudoku_plain": ("sudoku_akorn", {**SUDOKU, "n": 8, "heads": 2, "use_omega": False, "T": 8}, (9, 9)),
    "sudoku_pairs": ("sudoku_akorn", {**SUDOKU, "global_omg": False, "T": 4}, (9, 9)),
    "classifier": ("classifier_akorn", CLASSIFIER, (32, 32)),
    "classifier_n4": (
        "classifier_akorn",
        {**CLASSIFIER, "n": 4, "ch": 8, "ksizes": [5, 3, 3], "T": [1, 2, 3], "ro_N": 4, "ro_ksize": 1},
        (16, 16),
    ),
    "classifier_l2": (
        "classifier_akorn",
        {**CLASSIFIER, "L": 2, "ksizes": [3, 7], "norm": "none", "c_norm": "sandb", "use_omega": False},
        (32, 32),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_files_of_the_plain_transcription_pass(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind, arguments, size = CASES[name]
    path = record(tmp_path / f"{name}.safetensors", kind, arguments, size=size)
    code = golden.main([str(path)])
    assert code == 0, capsys.readouterr().out


@pytest.mark.skipif(not SHARED.is_dir(), reason="recorded tensors of the published code are not here")
def test_files_of_the_published_code_pass(capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(str(path) for path in SHARED.glob("*.safetensors"))
    assert golden.main(files) == 0, capsys.readouterr().out


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("golden")
    kinds = {"akorn": AKORN, "sudoku_akorn": {**SUDOKU, "T": 2}, "classifier_akorn": {**CLASSIFIER, "L": 2,
             "ksizes": [3, 3]}, "itrsa": CASES["itrsa"][1]}  # fmt: skip
    return {kind: record(folder / f"{kind}.safetensors", kind, arguments) for kind, arguments in kinds.items()}


def contents(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def altered(path: Path, name: str, *, seed: int = 0) -> torch.Tensor:
    """A recorded tensor moved by 100 times its tolerance, a weight by 5 %; a random half of an integer one by 1."""
    tensor = contents(path)[1][name]
    sign = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)).sign()
    if not tensor.is_floating_point():
        return tensor + (sign > 0).to(tensor.dtype)
    share = 0.05 if name.startswith("state.") else 100 * golden.tolerance_of(name)
    return tensor + share * tensor.abs().max() * sign


@pytest.mark.parametrize("kind", ["akorn", "sudoku_akorn", "classifier_akorn", "itrsa"])
def test_altering_any_recorded_tensor_fails(kind: str, recorded: dict[str, Path], tmp_path: Path) -> None:
    metadata, tensors = contents(recorded[kind])
    path = tmp_path / "altered.safetensors"
    for name in tensors:
        if name.endswith(("num_batches_tracked", "state.x0")):
            continue  # used by nothing
        save_file({**tensors, name: altered(recorded[kind], name)}, path, metadata)
        assert not all(good for good, _ in golden.lines(path)), name


@pytest.mark.parametrize("kind", ["akorn", "sudoku_akorn", "classifier_akorn", "itrsa"])
def test_missing_extra_and_renamed_tensors_fail(kind: str, recorded: dict[str, Path], tmp_path: Path) -> None:
    metadata, tensors = contents(recorded[kind])
    path = tmp_path / "changed.safetensors"
    save_file({**tensors, "another": torch.zeros(1)}, path, metadata)
    assert golden.main([str(path)]) == 1
    for i, name in enumerate(tensors):
        rest = {key: value for key, value in tensors.items() if key != name}
        if i % 5 == 0:
            save_file(rest, path, metadata)
            assert not all(good for good, _ in golden.lines(path)), f"{name} missing"
        save_file({**rest, f"{name}_": tensors[name]}, path, metadata)
        assert not all(good for good, _ in golden.lines(path)), f"{name} renamed"


def test_unknown_kind_and_wrong_arguments_fail(recorded: dict[str, Path], tmp_path: Path) -> None:
    metadata, tensors = contents(recorded["akorn"])
    config = json.loads(metadata["config"])
    path = tmp_path / "changed.safetensors"
    for change in ({"kind": "akorn2"}, {"T": 3}, {"ch": 64}, {"project": False}, {"gamma2": 1.0}):
        save_file(tensors, path, {"config": json.dumps({**config, **change})})
        assert golden.main([str(path)]) == 1, change


def test_no_golden_file_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match="no golden file"):
        golden.main([str(tmp_path / "text.safetensors")])
    with pytest.raises(ValueError, match="no such file"):
        golden.main([str(tmp_path / "absent.safetensors")])
