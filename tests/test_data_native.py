"""Compiling on first use: once, safely, and without fuss where it cannot be done."""

from __future__ import annotations

import ctypes
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pretrain.data import native
from pretrain.native import find_compiler

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("AKORN_CACHE", raising=False)
    path = tmp_path / "answer.cpp"
    path.write_text('extern "C" long answer(long x) { return 2 * x; }')
    return path


@needs_compiler
def test_a_source_is_compiled_once(source: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(native.library.__wrapped__, [source] * 4))
    for library in found:
        assert library is not None
        assert library.answer(ctypes.c_long(21)) == 42
    assert len(list((tmp_path / "cache").rglob("*.so"))) == 1


@needs_compiler
def test_a_changed_source_is_compiled_again(source: Path) -> None:
    assert native.library.__wrapped__(source) is not None
    source.write_text('extern "C" long answer(long x) { return 3 * x; }')
    library = native.library.__wrapped__(source)
    assert library is not None
    assert library.answer(ctypes.c_long(2)) == 6


@needs_compiler
def test_a_source_that_does_not_compile_is_warned_about(source: Path) -> None:
    source.write_text("this is no C++")
    with pytest.warns(UserWarning, match=r"could not compile answer\.cpp .*slower paths run"):
        assert native.library.__wrapped__(source) is None


def test_without_a_compiler_there_is_no_library(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert native.library.__wrapped__(source) is None


@needs_compiler
def test_a_cache_that_cannot_be_written_is_passed_over(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "other"))
    assert native.library.__wrapped__(source) is not None
    assert list((tmp_path / "other").rglob("*.so"))


@needs_compiler
def test_a_temporary_folder_that_others_can_write_to_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    folder = tmp_path / f"akorn-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.warns(UserWarning, match="others can write there"):
        assert native.library.__wrapped__(source) is None
    assert not list(folder.iterdir())
