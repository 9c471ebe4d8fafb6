"""From YAML and `key=value` overrides to a frozen configuration, with errors that say where and what to do.

Owns: strict YAML (1e-3 is a number, `on` is a string, a key stands once), where files are looked up, overrides, and
the wording of every validation error. Imports no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from configs.errors import UserError
from configs.jobs import LinearProbeConfig, ObjectDiscoveryConfig, RobustnessConfig, SudokuConfig
from configs.models import nearest
from configs.schema import PretrainConfig
from configs.section import Section

CONFIG_DIR = Path(__file__).resolve().parent

AnyJob = PretrainConfig | ObjectDiscoveryConfig | LinearProbeConfig | SudokuConfig | RobustnessConfig

JOBS: dict[str, type[AnyJob]] = {
    "pretrain": PretrainConfig,
    "object_discovery": ObjectDiscoveryConfig,
    "linear_probe": LinearProbeConfig,
    "sudoku": SudokuConfig,
    "robustness": RobustnessConfig,
}

KeyPath = tuple[str | int, ...]
ModelCheck = Callable[[str, dict[str, Any]], None]  # of a name and arguments; raises ValueError


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.2's scalars: only true/false are booleans, 1e-3 is a number, no dates; repeated keys are errors."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (none of YAML 1.1's; the base class has it so)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError(_at(self.name, key_node) + "a list or mapping stands where a key is expected")
            if key_node.value in seen:
                raise UserError(_at(self.name, key_node) + f"the key {key_node.value!r} stands twice; remove one")
            seen.add(key_node.value)
            key_node.tag = "tag:yaml.org,2002:str"  # keys are text, whatever they look like
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:null|~|)$"), ["n", "~", ""])
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789"))
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|nan)$"),
    list("-+.0123456789"),
)


def _at(source: str, node: yaml.Node) -> str:
    return f"{source}:{node.start_mark.line + 1}: "


@dataclass
class _Document:
    """Plain data of a configuration, and where each of its keys was written."""

    source: str
    data: dict[str, Any]
    places: dict[KeyPath, str] = field(default_factory=dict)

    def place(self, path: KeyPath) -> str:
        """Where the key at `path` was written: in an override at or below it, in the file, or in the nearest above."""
        for place_path, place in self.places.items():
            if path and not place.startswith(f"{self.source}:") and place_path[: len(path)] == path:
                return place
        for end in range(len(path), 0, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return self.source


def find(name: str | Path) -> Path:
    """The file that `name` stands for: a path, or a bare name looked up in configs/ (with or without .yaml).

    Raises:
        UserError: there is no such file; names the nearest configuration.
    """
    path = Path(name)
    if path.is_file():
        return path
    for candidate in (CONFIG_DIR / path.name, CONFIG_DIR / f"{path.name}.yaml"):
        if path.parent == Path(".") and candidate.is_file():
            return candidate
    known = sorted(file.name for file in CONFIG_DIR.glob("*.yaml"))
    raise UserError(f"no configuration {str(name)!r} here or in {CONFIG_DIR}" + nearest(path.name, known))


def read(path: Path) -> _Document:
    """Read one YAML file strictly, keeping the line of every key."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    return _parse(text, _shown(path))


def _shown(path: Path) -> str:
    """The path as a person would write it: relative to here where that is shorter."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _parse(text: str, source: str) -> _Document:
    loader = _StrictLoader(text)
    loader.name = source
    places: dict[KeyPath, str] = {}
    try:
        node = loader.get_single_node()
        data = loader.construct_document(node) if node is not None else {}
        if node is not None:
            _collect_places(node, (), source, places)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        raise UserError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from error
    except RecursionError:
        raise UserError(f"{source}: is nested too deeply, or holds itself by an anchor") from None
    finally:
        loader.dispose()
    if not isinstance(data, dict):
        raise UserError(f"{source}: expected `key: value` lines, found {type(data).__name__}")
    return _Document(source, data, places)


def _collect_places(node: yaml.Node, path: KeyPath, source: str, places: dict[KeyPath, str]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            places[(*path, key_node.value)] = f"{source}:{key_node.start_mark.line + 1}"
            _collect_places(value_node, (*path, key_node.value), source, places)
    elif isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            places[(*path, position)] = f"{source}:{item.start_mark.line + 1}"
            _collect_places(item, (*path, position), source, places)


def _override(document: _Document, override: str, source: str) -> None:
    """Set one `a.b.c=value` in the plain data; sections on the way are made where they are missing."""
    key, separator, text = override.partition("=")
    if not separator or not key or any(not part for part in key.split(".")):
        raise UserError(f"{source}: expected key=value, e.g. optimizer.lr=1e-3")
    value = _parse(f"value: {text}" if text else "value: null", source).data["value"]
    parts: list[str | int] = [int(part) if part.isdigit() else part for part in key.split(".")]
    target: Any = document.data
    for position, part in enumerate(parts[:-1]):
        target = _enter(target, part, f"{source}: {'.'.join(map(str, parts[: position + 1]))}")
    _enter(target, parts[-1], source, value=value)
    written = tuple(parts)  # what the file says below it is gone
    document.places = {path: place for path, place in document.places.items() if path[: len(written)] != written}
    document.places[written] = source


def _enter(target: Any, part: str | int, where: str, **assign: Any) -> Any:
    """One step down a key path; with `value` given, set it there."""
    if isinstance(target, list):
        if not isinstance(part, int) or part >= len(target):
            positions = f"; give a position from 0 to {len(target) - 1}" if target else ", which has no positions"
            raise UserError(f"{where}: is a list of {len(target)}{positions}")
    elif isinstance(target, dict):
        part = str(part)
        if "value" not in assign and target.get(part) is None:
            target[part] = {}
    else:
        raise UserError(f"{where}: lies inside a plain value, which has no keys")
    if "value" in assign:
        target[part] = assign["value"]
    return target[part]


def load(
    name: str | Path,
    overrides: Sequence[str] = (),
    *,
    flags: Mapping[str, str] | None = None,
    foreign: ModelCheck | None = None,
) -> AnyJob:
    """Load and check a configuration.

    Args:
        name: a path, or the bare name of a file in configs/.
        overrides: `key=value` strings; keys are dotted paths, values are YAML.
        flags: further overrides, which come first, each with the flag that the user gave for it.
        foreign: is asked about a model that is not of this project; None: any name will do.

    Raises:
        UserError: names file and line (or override, or flag), key, value, and the nearest valid key.
    """
    document = read(find(name))
    for override, source in [*(flags or {}).items(), *((text, f"override {text!r}") for text in overrides)]:
        _override(document, override, source)
    return _checked(document, foreign)


def _checked(document: _Document, foreign: ModelCheck | None) -> AnyJob:
    """Plain data as the schema of its `job` has it (pretrain where it has none); pydantic's errors as one `UserError`
    of a line for each value."""
    job = document.data.get("job", "pretrain")
    if str(job) not in JOBS:
        raise UserError(f"{document.place(('job',))}: job: {job!r} is no job" + nearest(str(job), list(JOBS)))
    schema = JOBS[str(job)]
    try:
        return schema.model_validate_json(json.dumps(document.data), context=foreign)
    except ValidationError as error:
        found: dict[KeyPath, list[Any]] = {}
        for item in error.errors():
            found.setdefault(_path(document.data, item), []).append(item)
        lines = [_explain(schema, document, path, items) for path, items in found.items()]
        shown = lines[:5] + ([f"and {len(lines) - 5} more"] if len(lines) > 5 else [])
        raise UserError("\n       ".join(shown)) from None


def _path(data: Any, item: Any) -> KeyPath:
    """The keys on the way to an error, without the tags and types of unions that pydantic puts between them."""
    path: list[str | int] = []
    for part in item["loc"]:
        inside: Any = range(len(data)) if isinstance(data, list) else data if isinstance(data, dict) else ()
        if part in inside:
            data = data[part]
            path.append(part)
    return (*path, item["loc"][-1]) if item["type"] == "missing" else tuple(path)


def _explain(schema: type[Section], document: _Document, path: KeyPath, items: list[Any]) -> str:
    """`place: key: what is wrong; remedy`, of what pydantic says of one value: an item for each type it might have."""
    item, key = items[0], ".".join(map(str, path))
    where = document.place(path) + (f": {key}: " if key else ": ")
    if item["type"] == "extra_forbidden":
        siblings = _fields_at(schema, item["loc"][:-1])
        return where + "unknown key" + nearest(str(path[-1]), siblings)
    if item["type"] == "union_tag_invalid":
        return where + f"{_tag_given(item)!r} is none of {item['ctx']['expected_tags']}"
    if item["type"] == "union_tag_not_found":
        return where + "the key `job` is missing; it says what is to be run, e.g. job: object_discovery"
    if item["type"] == "missing":
        return where + "is required and not given"
    if item["type"] == "value_error":
        return where + str(item["ctx"]["error"])
    wanted = dict.fromkeys(other["msg"].removeprefix("Input should be ") for other in items[1:])
    message = " or ".join([item["msg"], *wanted])
    return where + f"{message[0].lower()}{message[1:]}, not {json.dumps(item['input'], default=str)[:80]}"


def _tag_given(item: Any) -> str:
    value = item["input"]
    return str(value.get(item["ctx"]["discriminator"].strip("'"), value.get("name"))) if isinstance(value, dict) else ""


def _fields_at(schema: type[Section], loc: tuple[str | int, ...]) -> list[str]:
    """Names of the keys that are valid at a location of the schema."""
    current: Any = schema
    for part in loc:
        if isinstance(current, type) and issubclass(current, Section) and part in current.model_fields:
            current = current.model_fields[str(part)]
            current = _sections_in(current.annotation)
        elif isinstance(current, list) and isinstance(part, str):
            current = next((one for one in current if _tag_of(one) == part), current)
        if isinstance(current, list) and len(current) == 1:
            current = current[0]
    sections = current if isinstance(current, list) else [current]
    return sorted({name for section in sections for name in getattr(section, "model_fields", {})})


def _sections_in(annotation: Any) -> list[type[Section]]:
    """All section classes inside an annotation, through unions, tuples and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for argument in getattr(annotation, "__args__", ()) for section in _sections_in(argument)]


def _tag_of(section: type[Section]) -> str | None:
    for key in ("job", "name"):
        default = section.model_fields[key].default if key in section.model_fields else None
        if isinstance(default, str):
            return default
    return None


def dump(config: Section) -> str:
    """The configuration as YAML that loads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=False, width=120)
