"""The documents: links lead somewhere, commands name entry points and options that exist, the tree of files is true."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from configs import load
from configs.loader import CONFIG_DIR

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
)
COMMAND = re.compile(r"^\s*(?:\$ |# +)?(python (?:cluster|pretrain|downstream|tests)/\S+\.py.*?)(?:\s+#.*)?$")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def _commands() -> list[tuple[str, str]]:
    sources = [*DOCUMENTS, *CONFIG_DIR.glob("*.yaml"), ROOT / "Makefile"]
    return [
        (path.name, match.group(1).strip().rstrip("`").rstrip("\\"))
        for path in sources
        for line in path.read_text().splitlines()
        if (match := COMMAND.match(line))
    ]


@pytest.mark.parametrize(("document", "command"), _commands())
def test_commands_name_what_exists(document: str, command: str) -> None:
    words = shlex.split(command.split(" [")[0], posix=True)
    script = ROOT / words[1]
    assert script.is_file(), f"{document}: no {words[1]}"
    yamls = [word for word in words[2:] if word.endswith(".yaml") and "/" not in word]
    for name in yamls:
        overrides = [word for word in words[2:] if re.fullmatch(r"[a-z_.0-9]+=\S+", word) and "..." not in word]
        load(name, overrides)


def test_tree_of_files_in_the_readme() -> None:
    section = (ROOT / "README.md").read_text().split("## Files")[1].split("\n## ")[0]
    folders = re.findall(r"^    (\w+)/", section, re.MULTILINE)
    assert set(folders) >= {"configs", "pretrain", "downstream", "cluster", "tests", "docs"}
    for line in re.findall(r"^    (\w+)/\s+(.*)$", section, re.MULTILINE):
        for name in re.findall(r"\w+\.(?:py|md|yaml)", line[1]):
            assert (ROOT / line[0] / name).is_file(), f"{line[0]}/{name} does not exist"


def test_every_document_is_linked_from_another() -> None:
    linked = {
        (path.parent / target).resolve()
        for path in DOCUMENTS
        for target in re.findall(r"\]\(([^)#\s]+)", path.read_text())
        if not target.startswith("http")
    }
    for path in DOCUMENTS:
        assert path.parent == ROOT or path in linked, f"{path.name} is linked from nowhere"
