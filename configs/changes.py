"""What differs between the configuration of a run and the one it is to go on with, and whether that may be.

Owns: the rules of which keys may change on resume, read off the schema (`Section.may_change_on_resume` and
`PretrainConfig.changeable`), and of how far, and the wording of their refusals.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from configs.errors import UserError
from configs.schema import PretrainConfig
from configs.section import Section


@dataclass(frozen=True)
class Change:
    """One key whose value differs."""

    key: str  # dotted path
    old: Any
    new: Any
    allowed: bool

    def __str__(self) -> str:
        return f"{self.key}: {_brief(self.old)} -> {_brief(self.new)}"


def changes(old: PretrainConfig, new: PretrainConfig) -> list[Change]:
    """All keys whose values differ, in the order of the schema."""
    found: list[Change] = []
    for name in type(old).model_fields:
        before, after = getattr(old, name), getattr(new, name)
        section = bool(getattr(before, "may_change_on_resume", False))
        for key, one, other in _leaves(name, before, after):
            if one != other:
                allowed = section or not PretrainConfig.changeable.isdisjoint((name, key))
                found.append(Change(key, one, other, allowed))
    return found


def check_resume(old: PretrainConfig, new: PretrainConfig, where: str) -> list[Change]:
    """The changes of a run that goes on.

    Args:
        where: the run's folder, for the message.

    Raises:
        UserError: one of them would make it another training; names the keys and the two ways out.
    """
    found = changes(old, new)
    refused = [str(change) for change in found if not change.allowed]
    if refused:
        more = f" and {len(refused) - 4} more" if len(refused) > 4 else ""
        raise UserError(
            f"{where} was begun with other settings, which define the training ({', '.join(refused[:4])}{more});\n"
            f"       take them back, or start a new run with name=... (from these weights: init_from={where})"
        )
    return found


def check_length(steps: int, done: int, where: str) -> None:
    """Refuse a run of fewer steps than it has behind it."""
    if steps < done:
        raise UserError(
            f"{where} has trained for {done:,} steps already and is to have {steps:,}; give more, or start a new run "
            "with name=..."
        )


def _leaves(key: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Pairs of values by dotted key; where the two have different shapes, the pair above is given as a whole."""
    if type(old) is not type(new):
        yield key, old, new
    elif isinstance(old, Section):
        yield from _leaves(key, dict(old), dict(new))
    elif isinstance(old, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            yield from _leaves(f"{key}.{name}", old.get(name), new.get(name))
    elif isinstance(old, tuple) and len(old) == len(new) and any(isinstance(item, Section) for item in old):
        for i, (before, after) in enumerate(zip(old, new)):
            yield from _leaves(f"{key}.{i}", before, after)
    else:
        yield key, old, new


def _brief(value: Any) -> str:
    """A value in a line: jobs by their names."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_brief, value))}]"
    return str(getattr(value, "job", value))
