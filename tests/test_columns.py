"""The index's container: readable by safetensors itself, and refused when damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from configs.errors import UserError
from pretrain.data import columns

ARRAYS = {
    "bytes": np.arange(5, dtype=np.uint8),
    "wide": np.arange(6, dtype=np.int64).reshape(2, 3),
    "none": np.zeros((0, 4), np.uint32),
    "label": np.array([-3, 7], np.int32),
}


def test_safetensors_reads_it(tmp_path: Path) -> None:
    columns.write(tmp_path / "x", ARRAYS, {"format": "test"})
    theirs = load_file(tmp_path / "x")
    ours, metadata = columns.load(tmp_path / "x")
    assert metadata == {"format": "test"}
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(theirs[name], array)
        np.testing.assert_array_equal(ours[name], array)
        assert ours[name].dtype == array.dtype


def test_nothing_appears_when_filling_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), columns.create(tmp_path / "x", {"a": (np.dtype(np.uint8), (3,))}, {}):
        raise RuntimeError("full disk")
    assert list(tmp_path.iterdir()) == []


def test_damage_is_a_user_error(tmp_path: Path) -> None:
    columns.write(tmp_path / "x", ARRAYS, {})
    whole = (tmp_path / "x").read_bytes()
    for content in (b"", whole[:5], whole[:40], whole[:-60], b"\xff" * 100, b"\2\0\0\0\0\0\0\0[]"):
        (tmp_path / "y").write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            columns.load(tmp_path / "y")
