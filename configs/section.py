"""The base of every configuration section: frozen, strict, documented.

Owns: the pydantic settings all sections share, and the marker that says which of them may change when a run resumes.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what torch's generators take


class Section(BaseModel):
    """A part of a configuration. Unknown keys are errors, values are never coerced, nothing changes after loading."""

    # defer_build: a launch validates one or two of the schemas, and building all takes a third of its time.
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, validate_default=True, defer_build=True, allow_inf_nan=False
    )

    # True: a resumed run may change the keys of this section, since they decide how the training is computed or
    # watched and not what is computed. False: they define the training.
    may_change_on_resume: ClassVar[bool] = False
