"""Schemas of the downstream jobs: object discovery, probes, Sudoku solving, robustness.

Owns: the keys of each job. The command-line flags of the entry points in downstream/ are made from them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from configs.cluster import Cluster
from configs.models import Argument, nearest
from configs.presets import PRESETS
from configs.section import Section, Seed


class EvaluationConfig(Section):
    """What every evaluation has: a backbone, a data set, a place for the results."""

    ckpt: str | None = Field(None, description="run, export, published .pth or timm model name; in a chain: the run")
    data: str | None = Field(None, description="shards to evaluate on")
    out: str | None = Field(None, description="folder of the results; default: RUN/downstream/TASK")
    name: str | None = Field(None, description="name of the job and of its results; default: the task's")
    runs_dir: str = Field("runs", description="folder of all runs")
    images: PositiveInt | None = Field(None, description="evaluate on the first so many images only")
    batch_size: PositiveInt = Field(64, description="images per forward pass and process")
    seed: Seed = Field(0, description="of every random choice")
    cluster: Cluster = Cluster()

    def lacking(self) -> list[str]:
        """Keys without which there is nothing to evaluate: not given, and without a default."""
        return [] if self.data is not None else ["data"]


class BackboneConfig(EvaluationConfig):
    """How the backbone of an evaluation is read."""

    arch: str | None = Field(
        None, description="timm model that a bare weights file belongs to; default: a published AKOrN or ItrSA"
    )
    args: dict[str, Argument] = Field(
        default_factory=dict, description="arguments of that model, e.g. {T: 8}; published names for published files"
    )
    layer: str = Field(
        "readout", description="features: readout (the last map), oscillators, or the number of a timm feature level"
    )
    steps: NonNegativeInt | None = Field(None, description="T at test time; default: the model's own")
    input_size: PositiveInt | None = Field(None, description="side the model sees images at; default: the data's")
    device: str | None = Field(None, description="cpu, cuda, cuda:1, ...; default: the GPU if there is one")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of matrix products")


def _known_preset(name: str | None) -> str | None:
    if name is not None and name not in PRESETS:
        raise ValueError(f"no protocol {name!r}" + nearest(name, list(PRESETS)))
    return name


class ObjectDiscoveryConfig(BackboneConfig):
    """Unsupervised object discovery: group the features of each image, compare with its masks."""

    job: Literal["object_discovery"] = "object_discovery"
    also: tuple[str, ...] = Field((), description="further backbones in the same table, under the same protocol")
    preset: str | None = Field(None, description="protocol of a data set by name (docs/evaluation.md)")
    size: PositiveInt | None = Field(None, description="side of the scored images; default: the preset's")
    k: PositiveInt | None = Field(None, description="segments per image; default: the preset's")
    sweep: tuple[PositiveInt, ...] = Field((), description="further numbers of segments to score")
    method: Literal["linkage", "kmeans", "spectral", "codebook"] = Field(
        "linkage", description="average linkage, faiss k-means, normalised cut, or k-means over the whole data set"
    )
    distance: PositiveFloat | None = Field(None, description="cut the dendrogram here instead of at k segments")
    components: PositiveInt | None = Field(128, description="principal components kept per image; none: all")
    uptile: PositiveInt = Field(1, description="up-tiling factor: features on an r times finer grid")
    starts: PositiveInt = Field(4, description="random starts of the oscillators; scores are their mean")
    choose: Literal["mean", "energy"] = Field(
        "mean", description="energy: for each image, the start that ends in the lowest energy"
    )
    controls: tuple[Literal["random", "uncoupled", "no_steps"], ...] = Field(
        ("random",), description="random: untrained weights; uncoupled: J = 0; no_steps: T = 0"
    )
    baselines: tuple[Literal["colour", "colour_position", "components", "one_segment", "grid"], ...] = Field(
        ("colour", "colour_position", "components", "one_segment", "grid"),
        description="trivial methods scored beside; grid is the best that a grid of tokens can reach",
    )
    pictures: NonNegativeInt = Field(12, description="images drawn")
    bootstrap: NonNegativeInt = Field(2000, description="resamplings for the interval of differences")
    image: str | None = Field(None, description="segment this picture instead of scoring a data set")
    workers: PositiveInt | None = Field(None, description="threads of decoding and clustering; default: all cores")

    def lacking(self) -> list[str]:
        if self.image is not None:
            return []
        return super().lacking() + (["preset"] if self.preset is None and None in (self.size, self.k) else [])

    @field_validator("preset")
    @classmethod
    def _check_preset(cls, name: str | None) -> str | None:
        return _known_preset(name)


class LinearProbeConfig(BackboneConfig):
    """Linear probe and k-NN on frozen features."""

    job: Literal["linear_probe"] = "linear_probe"
    train: str | None = Field(None, description="labelled shards the probe is trained on")
    size: PositiveInt | None = Field(None, description="side of the images; default: the model's own input size")
    resize: PositiveInt | None = Field(None, description="shorter side before the centre crop; default: size / 0.875")
    features: tuple[Literal["pooled", "avg", "max", "oscillators", "pixels"], ...] = Field(
        ("pooled", "avg", "max"),
        min_length=1,
        description="heads are trained on each of these and on all of them together",
    )
    rates: tuple[PositiveFloat, ...] = Field(
        (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
        min_length=1,
        description="learning rates tried at once, for batches of 256",
    )
    epochs: PositiveInt = Field(30, description="passes of the heads over the training features")
    head_batch: PositiveInt = Field(1024, description="images per step of the heads")
    held_out: float = Field(0.1, gt=0, lt=1, description="share of the training set that chooses among the heads")
    crops: NonNegativeInt = Field(
        0, description="randomly cropped and flipped copies of the training set, besides the centre crop"
    )
    low_shot: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (), description="further probes on these shares of the training set, e.g. 0.01"
    )
    knn: tuple[PositiveInt, ...] = Field((10, 20, 100, 200), description="neighbours of the k-NN classifiers")
    knn_temperature: PositiveFloat = Field(0.07, description="temperature of their weights")
    controls: tuple[Literal["random", "pixels"], ...] = Field(
        ("random", "pixels"), description="probes of the untrained backbone and of raw pixels, beside"
    )
    segmentation: str | None = Field(
        None, description="probe the map on class masks instead, cut as this protocol of object discovery says"
    )
    cache_dir: str | None = Field(None, description="folder for features; default: in the results' folder")
    keep_features: bool = Field(False, description="leave the features there, with their keys in order")

    def lacking(self) -> list[str]:
        return super().lacking() + ([] if self.train is not None else ["train"])

    @field_validator("segmentation")
    @classmethod
    def _check_preset(cls, name: str | None) -> str | None:
        return _known_preset(name)


class SudokuConfig(EvaluationConfig):
    """Solving Sudokus with more computation at test time."""

    job: Literal["sudoku"] = "sudoku"
    args: dict[str, Argument] = Field(
        default_factory=dict, description="arguments of a published file, under their published names, e.g. {T: 16}"
    )
    device: str | None = Field(None, description="cpu, cuda, cuda:1, ...; default: the GPU if there is one")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of matrix products")
    T: tuple[PositiveInt, ...] = Field((16, 128), min_length=1, description="numbers of steps to read an answer at")
    starts: PositiveInt = Field(8, description="random starts of each puzzle")
    vote: tuple[Literal["energy", "energy-sum", "majority", "c-vote"], ...] = Field(
        ("energy", "energy-sum", "majority", "c-vote"),
        description="choice among starts: lowest last energy, lowest sum of energies over time, commonest digit of "
        "each cell, highest mean probability (arXiv 2604.13521)",
    )
    finish: bool = Field(False, description="stop a puzzle at the first start whose board breaks no rule")
    puzzle: str | None = Field(None, description="solve this puzzle of 81 characters instead of scoring a set")
    animate: bool = Field(True, description="write an animation of a board being solved")

    def lacking(self) -> list[str]:
        return [] if self.puzzle is not None else super().lacking()


class RobustnessConfig(EvaluationConfig):
    """Accuracy under attack and corruption, and calibration."""

    job: Literal["robustness"] = "robustness"
    arch: str | None = Field(None, description="timm model that a bare weights file belongs to")
    args: dict[str, Argument] = Field(default_factory=dict, description="arguments of that model")
    device: str | None = Field(None, description="cpu, cuda, cuda:1, ...; default: the GPU if there is one")
    size: PositiveInt | None = Field(None, description="side of the images; default: that of the first image")
    attacks: tuple[Literal["fgsm", "pgd", "pgd-l2", "autoattack", "autoattack-l2", "square"], ...] = Field(
        ("fgsm", "pgd", "pgd-l2", "autoattack", "square"), description="attacks to run; square: random search alone"
    )
    settings: tuple[Literal["fixed", "eot"], ...] = Field(
        ("fixed", "eot"),
        min_length=1,
        description="fixed: one start that the attacker knows; eot: fresh starts, gradients averaged over them",
    )
    eps: PositiveFloat = Field(8 / 255, description="radius of the Linf ball, images in [0, 1]")
    eps_l2: PositiveFloat = Field(0.5, description="radius of the L2 ball")
    curve: tuple[NonNegativeFloat, ...] = Field(
        (0.0, 1 / 255, 2 / 255, 4 / 255, 8 / 255, 16 / 255, 32 / 255, 64 / 255),
        description="Linf radii of the curve of loss and accuracy under PGD and under random search",
    )
    pgd_steps: PositiveInt = Field(40, description="steps of PGD")
    auto_steps: PositiveInt = Field(100, description="steps of each part of AutoAttack")
    auto_targets: PositiveInt = Field(9, description="classes that AutoAttack's targeted parts go to")
    queries: PositiveInt = Field(5000, description="queries of Square per image")
    draws: PositiveInt = Field(20, description="starts that a gradient is averaged over (eot)")
    starts: PositiveInt = Field(8, description="fresh starts that predictions and adversarial images are scored on")
    transfer_from: str | None = Field(None, description="another classifier whose adversarial images are tried")
    corruptions: tuple[str, ...] = Field(("all",), description="names of CIFAR-10-C's corruptions, all, or none")
    severities: tuple[int, ...] = Field((1, 2, 3, 4, 5), min_length=1, description="their severities")
    cifar10c: str | None = Field(None, description="folder of the published CIFAR-10-C arrays instead of our own")
    pictures: NonNegativeInt = Field(8, description="adversarial images drawn")


DownstreamJob = Annotated[
    ObjectDiscoveryConfig | LinearProbeConfig | SudokuConfig | RobustnessConfig, Field(discriminator="job")
]
