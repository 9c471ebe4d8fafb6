"""Silence: prints of Python and of child processes inside, none outside, exceptions unharmed."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest

from pretrain.quiet import quiet


def test_nothing_is_printed_inside_and_everything_outside(capfd: pytest.CaptureFixture[str]) -> None:
    shout = [sys.executable, "-c", "import sys; print('child'); print('child', file=sys.stderr)"]
    with quiet():
        print("banner")
        warnings.warn("old name", FutureWarning, stacklevel=1)
        subprocess.run(shout, check=True)
    print("result")
    out, err = capfd.readouterr()
    assert (out, err) == ("result\n", "")


def test_what_was_asked_for_is_printed(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    with quiet():
        subprocess.run([sys.executable, "-c", "print('NCCL INFO')"], check=True)
    assert capfd.readouterr().out == "NCCL INFO\n"


def _fail() -> None:
    with quiet():
        raise ValueError("what went wrong")


def test_exceptions_come_through(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="what went wrong"):
        _fail()
    print("still here")
    assert capfd.readouterr().out == "still here\n"
