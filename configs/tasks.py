"""What a run learns: the task sections of a training run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PositiveFloat, PositiveInt, Tag

from configs.section import Section

Share = Annotated[float, Field(ge=0, le=1)]


class SimclrTask(Section):
    """Contrastive pretraining with NT-Xent (SimCLR, arXiv 2002.05709) over the global batch."""

    name: Literal["simclr"] = "simclr"
    temperature: PositiveFloat = Field(0.1, description="temperature of NT-Xent")
    projector_hidden: PositiveInt | None = Field(None, description="width of the projector; default: 4 C")
    projector_out: PositiveInt | None = Field(None, description="size of the embedding; default: C, as published")


class ClassifyTask(Section):
    """Supervised classification with cross-entropy."""

    name: Literal["classify"] = "classify"
    num_classes: PositiveInt = Field(10, description="number of classes")
    augmix: bool = Field(False, description="AugMix (arXiv 1912.02781) after the crop, as published for AKOrN")
    label_smoothing: Share = Field(0.0, description="probability spread over all classes in the target")


class SudokuTask(Section):
    """Solving Sudoku: cross-entropy over all 81 cells."""

    name: Literal["sudoku"] = "sudoku"
    symmetries: bool = Field(True, description="show each board under another random symmetry in every epoch")


def _task_name(value: Any) -> str:
    """The discriminator of the union: the key `name`, simclr where it is left out."""
    return value.get("name", "simclr") if isinstance(value, dict) else getattr(value, "name", "simclr")


AnyTask = Annotated[
    Annotated[SimclrTask, Tag("simclr")]
    | Annotated[ClassifyTask, Tag("classify")]
    | Annotated[SudokuTask, Tag("sudoku")],
    Discriminator(_task_name),
]
