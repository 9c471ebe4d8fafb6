"""What a run learns: the protocol of a task, and the tasks by name.

Owns: everything that the trainer asks of a task. The trainer knows images, losses and labels only through it.

A step is `loss(embed(batch), batch)` over the global batch. The trainer may cut `embed` into chunks of samples and run
it twice (once without gradients, once per chunk for the backward pass); `loss` always sees the embeddings of all of
this rank's samples at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from configs.errors import UserError

if TYPE_CHECKING:
    import torch

    from configs.schema import PretrainConfig
    from pretrain.data.batch import Batch
    from pretrain.data.fetch import Transform


class Task(Protocol):
    """One way of training a backbone.

    May also have `describe(embeddings)`, which gives further metrics, as `loss` does, and is called now and then
    (collective).
    """

    @property
    def module(self) -> torch.nn.Module:
        """Everything that is trained: the backbone and, say, a projector. Built on the CPU; the engine moves it."""
        ...

    @property
    def backbone(self) -> torch.nn.Module:
        """What is exported; a part of `module` or all of it."""
        ...

    @property
    def transform(self) -> Transform:
        """What the loader does to a sample on the host; picklable and pure."""
        ...

    @property
    def separable(self) -> bool:
        """True where the loss is a mean over samples (supervised): `loss` is then called on each chunk by itself."""
        ...

    def embed(self, batch: Batch) -> torch.Tensor:
        """Return the outputs [b, ...] of the samples of a batch or of a part of it.

        Must be a function of the batch and the weights alone: what is random is drawn from the batch's keys, so that a
        second pass over the same samples, in other chunks, gives the same values. Must call `self.module(...)` itself,
        once, and no submodule directly: DeepSpeed's hooks hang on it. Runs under bf16 autocast when the run is in bf16.
        """
        ...

    def loss(self, embeddings: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss, a scalar in fp32, and metrics to log: detached scalars on the same device.

        separable: both are means over the samples given, without communication; the trainer averages them over chunks
        (weighted by their sizes) and ranks. Otherwise collective, called by every rank with the embeddings of all of
        its samples: both are those of the *global* batch, equal on all ranks, and the gradient with respect to
        `embeddings` is that of the global loss of one process (the trainer sums parameter gradients over the ranks).
        """
        ...


def make_task(config: PretrainConfig) -> Task:
    """Return the task that `config.task` names, with freshly initialised weights (from torch's generator).

    Raises:
        UserError: the model does not exist or does not fit the task.
    """
    if config.task.name == "sudoku":
        from pretrain.tasks.sudoku import Sudoku

        return Sudoku(config)
    task: Task
    if config.task.name == "classify":
        from pretrain.tasks.classify import Classify

        task = Classify(config)
    else:
        from pretrain.tasks.simclr import Simclr

        task = Simclr(config)
    _check_size(task.backbone, config)
    return task


def _check_size(backbone: Any, config: PretrainConfig) -> None:
    """Refuse views that a model with patches cannot take: other than the size it insists on, or less than a patch."""
    embedding = getattr(backbone, "patch_embed", None)
    own, patch = getattr(embedding, "img_size", None), getattr(embedding, "patch_size", None)
    if own is None or patch is None or config.views is None or getattr(backbone, "rescale_input", False):
        return
    size = config.views.size
    if getattr(embedding, "strict_img_size", False) and tuple(own) != (size, size):
        raise UserError(
            f"model.name={config.model.name} takes images of {own[0]} x {own[1]} pixels, not views.size={size}: "
            f"set model.args.img_size={size}, or views.size"
        )
    if size < max(patch):
        raise UserError(f"views.size={size} is less than a patch of model.name={config.model.name}: {max(patch)}")
