"""Every key is documented, and the names known without torch are those that the code has."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from configs.loader import JOBS, _sections_in
from configs.models import OWN_ARGUMENTS, OWN_MODELS
from configs.schema import Data, PretrainConfig
from configs.section import Section


def _all_sections(section: type[Section]) -> Iterator[type[Section]]:
    yield section
    for field in section.model_fields.values():
        for child in _sections_in(field.annotation):
            yield from _all_sections(child)


@pytest.mark.parametrize("job", JOBS)
def test_every_key_is_documented(job: str) -> None:
    for section in _all_sections(JOBS[job]):
        assert section.__doc__
        for name, field in section.model_fields.items():
            plain = not _sections_in(field.annotation) and name not in ("job", "name")
            assert field.description or not plain, f"{section.__name__}.{name} has no description"


@pytest.mark.parametrize(("pattern", "message"), [("(", "no regular expression"), ("(?P<key>.+)", "needs the groups")])
def test_a_pattern_of_names_has_both_groups(pattern: str, message: str) -> None:
    Data(shards="here", key_pattern=r"(?P<key>.+)\.(?P<part>[^.]+)")
    with pytest.raises(ValueError, match=message):
        Data(shards="here", key_pattern=pattern)


def test_model_names_equal_the_registry() -> None:
    import timm

    import pretrain  # noqa: F401

    registered = [name for prefix in ("akorn*", "itrsa*") for name in timm.list_models(prefix)]
    assert sorted(registered) == sorted(OWN_MODELS)


def test_model_arguments_equal_the_constructors() -> None:
    import timm
    import torch

    import pretrain  # noqa: F401
    from pretrain.models.sudoku import SudokuNet

    assert OWN_ARGUMENTS
    for family, arguments in OWN_ARGUMENTS.items():
        constructor: Any = SudokuNet
        if family != "sudoku":
            name = next(name for name in OWN_MODELS if name.startswith(family))
            with torch.device("meta"):
                constructor = type(timm.create_model(name))
        known = set(inspect.signature(constructor).parameters) - {"self", "kwargs", "kind"}
        assert set(arguments) == known


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 2**63),
        ("name", "x" * 201),
        ("optimizer", {"lr": float("inf")}),
        ("optimizer", {"betas": (0.9, 1.0)}),
        ("task", {"name": "simclr", "temperature": float("inf")}),
        ("model", {"name": "resnet18", "args": {"in_chans": 1}}),
        ("model", {"name": "resnet18", "args": {"num_classes": 10}}),
        ("model", {"name": "resnet18", "args": {"global_pool": ""}}),
    ],
)
def test_what_only_a_job_would_stumble_over_is_refused(key: str, value: object) -> None:
    plain = {"name": "x", "batch_size": 4, "steps": 1, "model": {"name": "resnet18"}, "data": {"shards": "here"}}
    plain["views"] = {"size": 32}
    PretrainConfig.model_validate(plain)
    with pytest.raises(ValidationError):
        PretrainConfig.model_validate({**plain, key: value})
