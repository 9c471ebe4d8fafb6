"""What an entry point makes of exceptions: an exit code and a line for the user's, a traceback for ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from configs import UserError
from configs.errors import INTERRUPTED, run


def raising(error: BaseException) -> Callable[[], int]:
    def main() -> int:
        raise error

    return main


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda: None) == 0
    assert run(lambda: 1) == 1
    assert run(raising(UserError("no such run"))) == 2
    assert run(raising(KeyboardInterrupt())) == INTERRUPTED
    assert capsys.readouterr().err == "error: no such run\ninterrupted\n"


def test_a_path_that_cannot_be_used_is_the_users(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert run(lambda: (tmp_path / "file" / "results.json").write_text("")) == 2
    assert run(lambda: tmp_path.write_text("")) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/file/results.json: Not a directory\nerror: {tmp_path}: Is a directory\n"
    )


def test_a_defect_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        run(raising(KeyError("ours")))
    with pytest.raises(FileNotFoundError):
        run(lambda: (tmp_path / "nothing").read_text())
