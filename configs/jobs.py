"""Schemas of the downstream jobs: object discovery, probes, Sudoku solving, robustness.

Owns: the keys of each job. The command-line flags of the entry points in downstream/ are made from them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from configs.cluster import Cluster
from configs.section import Section


class EvaluationConfig(Section):
    """What every evaluation has: a backbone, a data set, a place for the results."""

    ckpt: str | None = Field(None, description="run, export, published .pth or timm model name; in a chain: the run")
    data: str | None = Field(None, description="shards to evaluate on")
    out: str | None = Field(None, description="folder of the results; default: RUN/downstream/TASK")
    name: str | None = Field(None, description="name of the job and of its results; default: the task's")
    runs_dir: str = Field("runs", description="folder of all runs")
    images: PositiveInt | None = Field(None, description="evaluate on the first so many images only")
    batch_size: PositiveInt = Field(64, description="images per forward pass and process")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of matrix products")
    seed: NonNegativeInt = Field(0, description="of every random choice")
    cluster: Cluster = Cluster()


class ObjectDiscoveryConfig(EvaluationConfig):
    """Unsupervised object discovery: group the features of each image, compare with its masks."""

    job: Literal["object_discovery"] = "object_discovery"
    preset: str | None = Field(None, description="protocol of a data set by name (docs/evaluation.md)")


class LinearProbeConfig(EvaluationConfig):
    """Linear probe and k-NN on frozen features."""

    job: Literal["linear_probe"] = "linear_probe"
    train: str | None = Field(None, description="labelled shards the probe is trained on")


class SudokuConfig(EvaluationConfig):
    """Solving Sudokus with more computation at test time."""

    job: Literal["sudoku"] = "sudoku"


class RobustnessConfig(EvaluationConfig):
    """Accuracy under attack and corruption, and calibration."""

    job: Literal["robustness"] = "robustness"


DownstreamJob = Annotated[
    ObjectDiscoveryConfig | LinearProbeConfig | SudokuConfig | RobustnessConfig, Field(discriminator="job")
]
