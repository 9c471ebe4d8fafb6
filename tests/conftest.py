"""Settings of all tests: property tests have no deadline, since machines that run tests are busy."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("akorn", deadline=None)
settings.load_profile("akorn")
