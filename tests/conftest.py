"""Settings of all tests: property tests have no deadline, since machines that run tests are busy.

Tests are the same on every machine: they see no GPU, but for those marked `gpu`, which run by themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("akorn", deadline=None)
settings.load_profile("akorn")


def pytest_configure(config: pytest.Config) -> None:
    asked = config.option.markexpr
    if "gpu" not in asked or "not gpu" in asked:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="module")
def own_seams() -> Iterator[None]:
    """For modules that put the stand-ins of standin_run.py in place: what was there comes back after the module."""
    import pretrain.session
    import pretrain.tasks

    with pytest.MonkeyPatch.context() as patch:
        for module in (pretrain.session, pretrain.tasks):
            patch.setattr(module, "make_task", module.make_task)
        patch.setattr(pretrain.session, "_make_loader", pretrain.session._make_loader)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield
