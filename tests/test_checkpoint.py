"""Checkpoints: what is written comes back, what is damaged is seen, what is old goes, and nothing appears half."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from configs.schema import Checkpoints
from pretrain import checkpoint
from pretrain.checkpoint import Snapshot
from pretrain.lease import Fenced
from pretrain.saver import Saver
from pretrain.tensorfile import checksum_of, read_tensors, write_tensors


def snapshot(step: int) -> Snapshot:
    generator = torch.Generator().manual_seed(step)
    weights = {"a.weight": torch.randn(3, 4, generator=generator), "b": torch.tensor(step), "empty": torch.zeros(0, 2)}
    moments = {"a.weight.exp_avg": torch.randn(3, 4, generator=generator)}
    return Snapshot({"step": step, "stream": step}, {"weights": weights, "moments": moments})


def equal(one: Snapshot, other: Snapshot) -> bool:
    pairs = [(t, other.tensors[file][name]) for file, tensors in one.tensors.items() for name, t in tensors.items()]
    return one.state == other.state and all(torch.equal(mine, theirs) for mine, theirs in pairs)


def test_tensor_file_is_safetensors(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(5).bfloat16(),
        "strided": torch.randn(4, 6).T,
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(3, dtype=torch.int64),
    }
    checksum = write_tensors(tmp_path / "x.safetensors", tensors)
    assert checksum == checksum_of(tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:  # the library's own reader
        assert set(file.keys()) == set(tensors)
        assert all(torch.equal(file.get_tensor(name), tensors[name]) for name in tensors)
    assert all(torch.equal(t, tensors[name]) for name, t in read_tensors(tmp_path / "x.safetensors").items())


def test_written_state_comes_back(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, snapshot(12))
    assert path.name == "step_00000012"
    assert checkpoint.damage(path) is None
    assert checkpoint.newest(tmp_path) == path
    assert equal(snapshot(12), checkpoint.load(path))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["weights.safetensors", "moments.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", [Path.unlink, _truncate, _flip])
def test_any_harm_to_any_file_falls_back_to_the_one_before(tmp_path: Path, file: str, harm: Any) -> None:
    whole, newer = (checkpoint.write(tmp_path, snapshot(step)) for step in (5, 10))
    harm(newer / file)
    told: list[tuple[str, str]] = []
    found = checkpoint.newest(tmp_path, report=lambda path, reason: told.append((path.name, reason)))
    if file == "manifest.json" and harm is _flip:  # blanks in JSON may change without harm
        assert found in (whole, newer)
        return
    assert found == whole
    assert told[0][0] == newer.name
    assert told[0][1]


def test_full_disk_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = checkpoint.write(tmp_path, snapshot(5))

    def full(path: Path, tensors: dict[str, torch.Tensor]) -> str:
        path.write_bytes(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write(tmp_path, snapshot(10))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [before.name]
    assert checkpoint.damage(before) is None


def test_same_step_again_replaces_the_old_one(tmp_path: Path) -> None:
    _flip(checkpoint.write(tmp_path, snapshot(5)) / "state.json")
    assert checkpoint.damage(checkpoint.write(tmp_path, snapshot(5))) is None
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_retention(tmp_path: Path) -> None:
    for step in range(1, 11):
        checkpoint.write(tmp_path, snapshot(step))
    checkpoint.remove_old(tmp_path, keep_last=2, keep_every=4)
    assert [step for step, _ in checkpoint.existing(tmp_path)] == [4, 8, 9, 10]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 4


def test_leftovers_of_killed_processes_are_no_checkpoints(tmp_path: Path) -> None:
    whole = checkpoint.write(tmp_path, snapshot(5))
    half = tmp_path / "checkpoints" / ".step_00000010.99.partial"
    half.mkdir()
    assert checkpoint.newest(tmp_path) == whole
    checkpoint.remove_leftovers(tmp_path)
    assert not half.exists()


def test_unknown_format_is_not_read(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, snapshot(5))
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    assert "format 99" in str(checkpoint.damage(path))


@pytest.mark.parametrize("background", [True, False])
def test_saver_goes_on_after_a_failure_and_ends_when_fenced(tmp_path: Path, background: bool) -> None:
    told: list[str] = []
    owned = True

    def allowed() -> None:
        if not owned:
            raise Fenced("replaced")

    config = Checkpoints(keep_last=2, background=background)
    saver = Saver(tmp_path, config, report=lambda event, **fields: told.append(event), allowed=allowed)
    (tmp_path / "checkpoints").write_text("in the way")
    saver.save(snapshot(1))
    saver.join()
    (tmp_path / "checkpoints").unlink()
    for step in (2, 3, 4):
        saver.save(snapshot(step))
    saver.join()
    assert told == ["save_failed", "saved", "saved", "saved"]
    owned = False

    def save() -> None:
        saver.save(snapshot(5))
        saver.join()

    with pytest.raises(Fenced):
        save()
    assert [step for step, _ in checkpoint.existing(tmp_path)] == [3, 4]


def test_a_defect_of_the_write_ends_the_training(tmp_path: Path) -> None:
    saver = Saver(tmp_path, Checkpoints(), report=lambda event, **fields: None, allowed=lambda: None)
    saver.save(Snapshot({"step": 1}, {"weights": {"w": torch.zeros(2, dtype=torch.complex64)}}))  # has no format
    with pytest.raises(KeyError, match="complex64"):
        saver.join()
