"""Command-line flags made from a configuration's schema, so that a YAML and the command line say the same.

Owns: the parser (`--learning-rate 0.1` for the key `learning_rate`) and the way from flags to a checked configuration:
the job's YAML, then the flags that were given, then `key=value` overrides. Imports no torch.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin

from configs.errors import UserError
from configs.loader import find, load, read
from configs.section import Section

Job = TypeVar("Job", bound=Section)
_HIDDEN = ("job", "cluster", "runs_dir")  # chosen by the entry point; used by the launcher


def parse(
    schema: type[Job],
    argv: Sequence[str] | None,
    *,
    description: str,
    config: str,
    spill: tuple[str, str] | None = None,
) -> Job:
    """The configuration that a command line describes.

    Args:
        schema: the job's schema; every plain field of it becomes a flag.
        argv: arguments; None: those of the process.
        description: of the entry point.
        config: name of the YAML that is read when no `--config` is given.
        spill: (key, list key): the flag of the first takes several values, all but one of which go to the second.

    Raises:
        UserError: an unknown key or a value that does not fit.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", default=config, help=f"YAML to start from (default: {config}.yaml in configs/)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the configuration")
    for name, field in schema.model_fields.items():
        if name not in _HIDDEN:
            _add(parser, name, field.annotation, field, several=spill is not None and name == spill[0])
    arguments = vars(parser.parse_intermixed_args(argv))
    source, overrides = arguments.pop("config"), arguments.pop("overrides")
    given = {name: value for name, value in arguments.items() if value is not None}
    if spill is not None and spill[0] in given:
        given[spill[0]], *rest = given[spill[0]]
        if rest:
            given[spill[1]] = rest + given.get(spill[1], [])
    job, own = read(find(source)).data.get("job", "pretrain"), schema.model_fields["job"].default
    loaded = load(source, overrides, flags=_overrides(schema, given)) if job == own else None
    if not isinstance(loaded, schema):
        raise UserError(f"{source} describes the job {job!r}, this is {own}: give another --config, or none")
    return loaded


def _add(parser: argparse.ArgumentParser, name: str, annotation: Any, field: Any, *, several: bool) -> None:
    """One flag. Values are checked by the schema, not here, so that errors are the same everywhere."""
    flag = "--" + name.replace("_", "-")
    default = field.get_default(call_default_factory=True)
    shown = "" if default in (None, (), {}) else f" (default: {_shown(default)})"
    options: dict[str, Any] = {"default": None, "help": ((field.description or "") + shown).replace("%", "%%")}
    if annotation is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        return
    if _is_mapping(annotation) or _tuple_of(annotation) is not None:
        options["nargs"] = "*"
    if several:
        options["nargs"] = "+"
    options["metavar"] = _metavar(annotation)
    parser.add_argument(flag, **options)


def _overrides(schema: type[Section], given: dict[str, Any]) -> dict[str, str]:
    """The loader's `key=value` strings, each with the flag as it was given."""
    lines: dict[str, str] = {}
    for name, value in given.items():
        annotation, flag = schema.model_fields[name].annotation, "--" + name.replace("_", "-")
        if _is_mapping(annotation):
            lines |= {f"{name}.{pair}": f"{flag} {pair}" for pair in value}
        elif isinstance(value, list):
            single = str in _members(annotation) and len(value) == 1
            items = [json.dumps(item) if _texts(annotation) else item for item in value]
            lines[f"{name}={items[0] if single else '[' + ', '.join(items) + ']'}"] = f"{flag} {' '.join(value)}"
        elif isinstance(value, bool):
            lines[f"{name}={str(value).lower()}"] = flag
        else:
            quoted = _texts(annotation) and value.lower() not in ("none", "null")
            text = json.dumps(value) if quoted else "null" if value.lower() == "none" else value
            lines[f"{name}={text}"] = f"{flag} {value}"
    return lines


def _members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a type: those of a union, or itself."""
    if get_origin(annotation) in (tuple, Literal, dict) or not get_args(annotation):
        return (annotation,)
    if "Annotated" in str(get_origin(annotation)) or hasattr(annotation, "__metadata__"):
        return _members(get_args(annotation)[0])
    return tuple(member for part in get_args(annotation) for member in _members(part))


def _tuple_of(annotation: Any) -> Any:
    """The type of the items where a field may be a tuple, else None."""
    return next((get_args(one)[0] for one in _members(annotation) if get_origin(one) is tuple), None)


def _is_mapping(annotation: Any) -> bool:
    return any(get_origin(one) is dict for one in _members(annotation))


def _texts(annotation: Any) -> bool:
    """Whether values are text, which a YAML parser must not read as numbers."""
    inner = _tuple_of(annotation)
    of = _members(annotation) if inner is None else _members(inner)
    return any(one is str or get_origin(one) is Literal for one in of)


def _metavar(annotation: Any) -> str:
    inner = _tuple_of(annotation)
    for one in _members(annotation if inner is None else inner):
        if get_origin(one) is Literal:
            return "{" + ",".join(map(str, get_args(one))) + "}"
    if _is_mapping(annotation):
        return "key=value"
    names = {int: "N", float: "X", str: "TEXT"}
    return next((names[one] for one in _members(annotation if inner is None else inner) if one in names), "VALUE")


def _shown(default: Any) -> str:
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
