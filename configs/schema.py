"""The schema of a training run: every key, its type, default, range and meaning.

Owns: sections of a pretraining (or supervised) run and the checks across them. Sections are the keyword arguments of
what they configure. Loading and checking import no torch.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from configs.cluster import Cluster
from configs.jobs import DownstreamJob
from configs.models import SUDOKU_MODELS, Model, nearest
from configs.presets import PRESETS
from configs.section import Section, Seed
from configs.tasks import AnyTask, Share, SimclrTask


class Data(Section):
    """The training set and how it is read."""

    shards: str | tuple[str, ...] = Field(description="folder, brace pattern or list of WebDataset tars; URLs too")
    window: PositiveInt = Field(16, description="shards whose samples are shuffled together")
    lanes: PositiveInt = Field(1, description="fixed number of lanes the shards are dealt to, for remote data")
    parts: dict[str, str] = Field(
        default_factory=dict, description="names of parts in foreign shards, e.g. {image: jpeg, cls: label}"
    )
    key_pattern: str | None = Field(
        None, description="regular expression of file names in foreign shards, with groups `key` and `part`"
    )
    keep: Literal["disk", "memory", "device"] = Field("disk", description="where decoded images are kept")
    max_broken: Share = Field(0.01, description="share of broken samples above which the run stops")
    max_pixels: PositiveInt = Field(89_478_485, description="images with more pixels are broken samples")

    @model_validator(mode="after")
    def _check_pattern(self) -> Data:
        try:
            groups = re.compile(self.key_pattern or "(?P<key>)(?P<part>)").groupindex
        except re.error as error:
            raise ValueError(f"data.key_pattern is no regular expression: {error}") from None
        if not {"key", "part"} <= set(groups):
            raise ValueError("data.key_pattern needs the groups (?P<key>...) and (?P<part>...)")
        return self


class Loading(Section):
    """How fast data is read; changes nothing of what is read."""

    may_change_on_resume: ClassVar[bool] = True

    workers: NonNegativeInt | None = Field(None, description="loader processes per rank; default: by cores")
    prefetch: PositiveInt = Field(2, description="batches prepared ahead")
    cache_dir: str | None = Field(None, description="node-local folder for remote shards")
    cache_gb: PositiveFloat = Field(100.0, description="limit of that folder in GB; least recently used go first")
    timeout_s: PositiveFloat = Field(300.0, description="seconds after which a stalled read or worker is an error")
    retries: NonNegativeInt = Field(3, description="attempts at a remote shard after the first")


class Views(Section):
    """Random views of an image (SimCLR, arXiv 2002.05709, appendix A; AKOrN's published values as defaults)."""

    size: PositiveInt = Field(description="side of a view in pixels")
    scale: tuple[float, float] = Field((0.08, 1.0), description="share of the image's area that a crop covers")
    ratio: tuple[float, float] = Field((3 / 4, 4 / 3), description="aspect ratio of a crop")
    flip: Share = Field(0.0, description="probability of a horizontal flip")
    jitter: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = Field(
        (0.4, 0.4, 0.4, 0.1), description="strength of brightness, contrast, saturation, hue"
    )
    jitter_p: Share = Field(0.8, description="probability of colour jitter")
    grey_p: Share = Field(0.2, description="probability of greyscale")
    blur_p: Share = Field(0.0, description="probability of Gaussian blur")
    blur_sigma: tuple[PositiveFloat, PositiveFloat] = Field((0.1, 2.0), description="sigma of the blur in pixels")

    @model_validator(mode="after")
    def _check_ranges(self) -> Views:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"views.scale must be two rising shares of the area in (0, 1], not {list(self.scale)}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"views.ratio must be two rising positive numbers, not {list(self.ratio)}")
        if self.jitter[3] > 0.5:
            raise ValueError(f"views.jitter: hue must be at most 0.5, not {self.jitter[3]}")
        return self


Decay = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Section):
    """The optimizer. Weight decay falls on matrices only: not on GTA, Omega, gamma, biases and norms."""

    name: Literal["adamw", "adam", "lars"] = Field("adamw", description="lars: by parameter, ZeRO stage 0 only")
    lr: PositiveFloat = Field(1e-3, description="peak learning rate for the global batch as given (no scaling rule)")
    weight_decay: NonNegativeFloat = Field(0.0, description="weight decay on matrices")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="Adam's decay rates")
    eps: PositiveFloat = Field(1e-8, description="Adam's epsilon")
    momentum: Share = Field(0.9, description="LARS's momentum")
    trust: PositiveFloat = Field(1e-3, description="LARS's trust coefficient")
    clip: PositiveFloat | None = Field(None, description="largest norm of the gradient; none: no clipping")


class Schedule(Section):
    """The learning rate over the steps."""

    name: Literal["constant", "cosine"] = Field("cosine", description="shape after warm-up")
    warmup_steps: NonNegativeInt = Field(0, description="steps of linear warm-up")
    warmup_epochs: NonNegativeFloat = Field(0.0, description="the same in epochs; give one of the two")
    final: Share = Field(0.0, description="learning rate at the end of the cosine, as a share of the peak")

    @model_validator(mode="after")
    def _check_one(self) -> Schedule:
        if self.warmup_steps and self.warmup_epochs:
            raise ValueError("schedule: give warmup_steps or warmup_epochs, not both")
        return self


class Ema(Section):
    """The running average of the weights that is exported. Its decay ramps up as 1 - (1 + updates)^(-2/3)."""

    decay: Share = Field(0.998, description="largest decay per update; 0: no averaging")
    every: PositiveInt = Field(10, description="steps between updates")
    start: NonNegativeInt = Field(200, description="steps before averaging; until then the average is the weights")
    horizon: Share | None = Field(None, description="instead of decay: window as a share of the planned steps")


class Compute(Section):
    """How a step is computed: changes speed and memory, and the result only by float rounding."""

    may_change_on_resume: ClassVar[bool] = True

    precision: Literal["fp32", "bf16"] = Field("bf16", description="of matrix products; parameters and state are fp32")
    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="DeepSpeed ZeRO stage")
    micro_batch: PositiveInt | None = Field(
        None, description="images per process computed at once; none: all (and CUDA graphs where they help)"
    )
    compile: bool = Field(
        True, description="torch.compile of K-layers, and on GPUs of readouts, colour and starts; needs a C++ compiler"
    )
    recompute: bool = Field(False, description="recompute oscillator steps in the backward pass to save memory")
    kernel: Literal["auto", "plain", "compiled", "graphed", "native"] = Field(
        "auto",
        description="way of computing the K-layers; auto: measured at the start, recorded in kernels.json; graphed: "
        "CUDA graphs, at zero_stage 0 without micro_batch and recompute",
    )


class Checkpoints(Section):
    """When checkpoints are written and which are kept."""

    may_change_on_resume: ClassVar[bool] = True

    save_every: PositiveInt = Field(1000, description="steps between checkpoints")
    keep_last: PositiveInt = Field(2, description="newest checkpoints kept")
    keep_every: PositiveInt | None = Field(None, description="checkpoints at multiples of this step are kept for good")
    background: bool = Field(True, description="write beside the training from a copy in host memory")


class Monitor(Section):
    """What is measured and shown while training."""

    may_change_on_resume: ClassVar[bool] = True

    log_every: PositiveInt = Field(10, description="steps between reads of the metrics (a device sync each)")
    tensorboard: bool = Field(True, description="write TensorBoard event files")
    wandb: str | None = Field(None, description="Weights & Biases project; needs `pip install wandb`")


class Resilience(Section):
    """What happens when something goes wrong."""

    may_change_on_resume: ClassVar[bool] = True

    max_bad_steps: PositiveInt = Field(5, description="non-finite steps in a row before a rollback")
    max_restarts: NonNegativeInt = Field(3, description="restarts without progress before giving up")
    watchdog_s: PositiveFloat = Field(600.0, description="least seconds a step may take before it counts as hung")
    watchdog_factor: PositiveFloat = Field(20.0, description="or this many times the usual step time, if longer")


class Observers(Section):
    """Evaluation while training, on the EMA weights, outside the measured step."""

    may_change_on_resume: ClassVar[bool] = True

    knn_every: PositiveInt | None = Field(None, description="steps between online k-NN evaluations")
    knn_train: str | None = Field(None, description="labelled shards that serve as neighbours")
    knn_test: str | None = Field(None, description="labelled shards to classify")
    objects_every: PositiveInt | None = Field(None, description="steps between online object discoveries")
    objects_data: str | None = Field(None, description="shards with instance masks")
    objects_preset: str = Field("tetrominoes", description="protocol (docs/evaluation.md)")
    images: PositiveInt = Field(256, description="images used at most")

    @model_validator(mode="after")
    def _check_data(self) -> Observers:
        if self.knn_every is not None and (self.knn_train is None or self.knn_test is None):
            raise ValueError("observers.knn_every needs observers.knn_train and observers.knn_test (labelled shards)")
        if self.objects_every is not None and self.objects_data is None:
            raise ValueError("observers.objects_every needs observers.objects_data (shards with instances.png)")
        if self.objects_preset not in PRESETS:
            remedy = nearest(self.objects_preset, list(PRESETS))
            raise ValueError(f"observers.objects_preset: no protocol {self.objects_preset!r}{remedy}")
        return self


RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$"


class PretrainConfig(Section):
    """A training run. The global batch and the number of steps define it; cluster and compute say how it is done."""

    job: Literal["pretrain"] = Field("pretrain", description="what this file describes")
    name: str = Field(pattern=RUN_NAME, description="the run's folder is RUNS_DIR/NAME")
    runs_dir: str = Field("runs", description="folder of all runs")
    seed: Seed = Field(0, description="decides initial weights, order, views and oscillators")
    init_from: str | None = Field(None, description="run, checkpoint or export whose weights a new run starts from")
    batch_size: PositiveInt = Field(description="images per step over all processes")
    epochs: PositiveFloat | None = Field(None, description="length of the run in passes over the data")
    steps: PositiveInt | None = Field(None, description="or in steps; give one of the two")
    task: AnyTask = Field(SimclrTask(), description="what is learned")
    model: Model
    data: Data
    loading: Loading = Loading()
    views: Views | None = Field(None, description="random views; needed by simclr and classify")
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    ema: Ema = Ema()
    compute: Compute = Compute()
    checkpoints: Checkpoints = Checkpoints()
    monitor: Monitor = Monitor()
    resilience: Resilience = Resilience()
    observers: Observers = Observers()
    cluster: Cluster = Cluster()
    downstream: tuple[DownstreamJob, ...] = Field((), description="jobs to run on the result, in order")

    # Keys outside such sections that a resumed run may change. A run may be renamed, its data may lie elsewhere (their
    # fingerprint tells whether they are the same), and more broken samples may be put up with.
    changeable: ClassVar[frozenset[str]] = frozenset(
        {"name", "runs_dir", "steps", "epochs", "downstream", "data.shards", "data.max_broken"}
    )

    @model_validator(mode="after")
    def _check_across(self) -> PretrainConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give the length of the run as epochs or as steps: one of the two")
        if self.task.name == "simclr" and self.batch_size < 2:
            raise ValueError("batch_size must be at least 2: simclr tells the images of a batch from each other")
        if self.task.name in ("simclr", "classify") and self.views is None:
            raise ValueError(f"task {self.task.name} needs a views section with at least views.size")
        if (self.task.name == "sudoku") != (self.model.name in SUDOKU_MODELS):
            raise ValueError(f"model.name={self.model.name} does not fit task {self.task.name}")
        self._check_image_model()
        if self.optimizer.name == "lars" and self.compute.zero_stage > 0:
            raise ValueError("optimizer.name=lars needs compute.zero_stage=0: its norms are by parameter")
        return self

    def _check_image_model(self) -> None:
        """Refuse arguments of the model that are the task's to decide."""
        arguments = self.model.args if self.task.name != "sudoku" else {}
        if arguments.get("in_chans", 3) != 3:
            raise ValueError("model.args.in_chans must be 3: images are read as RGB, grey ones too")
        if "num_classes" in arguments:
            raise ValueError(
                "model.args.num_classes is the task's: classify has task.num_classes, simclr trains without classes"
            )
        if self.task.name == "simclr" and arguments.get("global_pool") == "":
            raise ValueError("model.args.global_pool must not be empty: simclr compares one vector of each view")

    def num_steps(self, num_samples: int) -> int:
        """Length of the run over so many images: as given, or epochs rounded up to whole global batches."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None  # one of the two is given
        batches = self.epochs * num_samples / self.batch_size
        return max(1, math.ceil(round(batches, 6)))  # 1.1 * 100 is 110.00000000000001

    @property
    def run_dir(self) -> str:
        """The run's folder, RUNS_DIR/NAME."""
        return f"{self.runs_dir.rstrip('/')}/{self.name}"
