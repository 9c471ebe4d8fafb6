"""The layout: imports point one way, files keep to one noun and a bounded length, entry points start from anywhere."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("configs", "pretrain", "downstream", "cluster")
MAY_IMPORT = {
    "configs": {"configs"},
    "pretrain": {"pretrain", "configs"},
    "downstream": {"downstream", "pretrain", "configs"},
    "cluster": {"cluster", "configs"},
}
# What runs inside the job on a node may reach for everything, inside its functions.
INSIDE_JOB = {"cluster/job.py"}
ENTRY_POINTS = (
    "cluster/launch.py",
    "pretrain/make_shards.py",
    "pretrain/export.py",
    "pretrain/bench.py",
    "downstream/object_discovery.py",
    "downstream/linear_probe.py",
    "downstream/sudoku.py",
    "downstream/robustness.py",
    "downstream/report.py",
)

# Files without a test file that names them: the tests of the command or file that they are a part of.
TESTED_THROUGH = {
    "downstream.score_table": "test_object_discovery.py",
    "pretrain.data.verifying": "test_make_shards.py",
    "pretrain.models.conversion": "test_reference.py",
    "pretrain.sickness": "test_train.py",
}

SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def _imported_packages(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    relative = str(path.relative_to(ROOT))
    package = relative.split("/")[0]
    tree = ast.parse(path.read_text())
    ours = set(_imported_packages(tree)) & set(PACKAGES)
    if relative in INSIDE_JOB:
        top = ast.Module(
            body=[node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)], type_ignores=[]
        )
        ours = set(_imported_packages(top)) & set(PACKAGES)
    assert ours <= MAY_IMPORT[package]
    assert "tests" not in set(_imported_packages(tree))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_one_noun_of_bounded_length(path: Path) -> None:
    assert path.stem not in {"utils", "util", "common", "helpers", "helper", "misc"}
    text = path.read_text()
    assert len(text.splitlines()) <= 400, "split the file by noun"
    assert text.isascii()
    assert not text or ast.get_docstring(ast.parse(text)), "a file says at its top what it owns"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_function_is_longer_than_sixty_lines(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{node.name} is too long"


@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_entry_points_start_from_any_directory(entry: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / entry), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()
    assert not done.stderr


def test_launcher_starts_without_torch(tmp_path: Path) -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import cluster.launch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(ROOT)], cwd=tmp_path, check=False).returncode == 0


def test_every_source_file_has_a_test_that_imports_it() -> None:
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    missing = []
    for path in SOURCES:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        name, _, stem = module.rpartition(".")
        mentioned = module in tests or f"from {name} import {stem}" in tests or str(path.relative_to(ROOT)) in tests
        if path.name != "__init__.py" and not mentioned and f"{stem}" not in tests:
            missing.append(module)
    assert set(missing) <= set(TESTED_THROUGH)
    assert all((ROOT / "tests" / name).is_file() for name in TESTED_THROUGH.values())
