"""What the benchmark runs: the product's training step on random images, and the published way of working.

Legend: b images of this rank, V views of each (2; 1 where the task classifies), S side of a view, N tokens, C channels,
n components, K = C/n oscillators.
"""

from __future__ import annotations

import importlib
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import PretrainConfig
from configs.tasks import ClassifyTask
from pretrain import kernels
from pretrain.data.batch import Batch
from pretrain.distributed import Ranks
from pretrain.engine import Engine
from pretrain.models.kuramoto import KuramotoLayer
from pretrain.session import views_of
from pretrain.tasks import make_task
from pretrain.timing import Clock, Step, flops_per_view


class Ours:
    """The training step as train.py runs it, without micro-batches."""

    def __init__(self, config: PretrainConfig, ranks: Ranks) -> None:
        assert config.views is not None
        torch.manual_seed(config.seed)
        self.config, self.ranks, self.size = config, ranks, config.views.size
        self.num_views = views_of(config)
        self.num_images = config.batch_size // ranks.world_size
        self.task: Any = make_task(config)
        self.task.module.to(ranks.device).train()
        with tempfile.TemporaryDirectory() as folder:
            compute = config.compute.model_copy(update={"micro_batch": None})
            images = self.num_views * self.num_images
            rows = kernels.set_up(self.task.backbone, compute, ranks, Path(folder), images=images)
        self.kernels = [row["kernel"] for row in rows]
        self.engine = Engine(self.task, config.compute, config.optimizer, ranks, None)
        generator = torch.Generator().manual_seed(ranks.rank)
        shape = (self.num_images, self.num_views, 3, self.size, self.size)
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        classes = config.task.num_classes if isinstance(config.task, ClassifyTask) else 1
        self.labels = torch.randint(0, classes, (self.num_images,), generator=generator)
        self.turn = 0

    def batch(self) -> Batch:
        ids = torch.arange(self.num_images) + self.ranks.rank * self.num_images
        self.turn += 1
        tensors = {"images": self.images.to(self.ranks.device), "label": self.labels.to(self.ranks.device)}
        return Batch(tensors, ids, torch.full_like(ids, self.turn), ids, self.config.seed)

    def step(self, clock: Clock) -> float:
        with clock.part("data"):
            batch = self.batch()
        with clock.part("forward"):
            embeddings = self.engine.embed(batch)
        with clock.part("loss"):
            loss, _ = self.task.loss(embeddings, batch)
        with clock.part("backward"):
            self.engine.backward(loss * self.ranks.world_size, last=True)
        with clock.part("optimizer"):
            self.engine.step(1e-4)
        return loss.item()

    def flops_per_view(self) -> int:
        """FLOPs of one view's forward, backbone and projector, counted on the plain kernel."""
        module = self.task.module
        before = [(part, part.kernel) for part in module.modules() if hasattr(part, "kernel")]
        for part, _ in before:
            part.kernel = "plain"
        shape = getattr(self.task.backbone, "start_shape", None)
        start = None if shape is None else torch.randn(1, *shape(self.size))
        module.eval()  # of one view BatchNorm can make no statistics
        count = flops_per_view(module, torch.randn(1, 3, self.size, self.size), start)
        module.train()
        for part, kernel in before:
            part.kernel = kernel
        return count

    def features_s(self, rounds: int) -> float:
        """Seconds per batch of pooled features of one view in evaluation, in the step's precision."""
        backbone = self.task.backbone.eval()
        images = self.images[:, 0].to(self.ranks.device).float() / 127.5 - 1
        seconds = _timed_inference(backbone, images, rounds, self.config.compute.precision)
        backbone.train()
        return seconds


class Plain:
    """The tests' transcription with Adam and the full loss on every rank, on the same images."""

    def __init__(self, config: PretrainConfig, ranks: Ranks, ours: Ours) -> None:
        try:
            models, loss = (importlib.import_module(f"tests.plain.{name}") for name in ("models", "loss"))
        except ImportError as error:
            raise UserError("--against plain needs the tests folder of a checkout, which is not here") from error
        arguments = _published_arguments(ours.task.backbone)
        torch.manual_seed(config.seed)
        self.model: nn.Module = models.AKOrN(**arguments).to(ranks.device)
        self._loss, self._temperature = loss.nt_xent, getattr(config.task, "temperature", 0.1)
        self._optimizer = torch.optim.Adam(self.model.parameters(), 1e-4)
        self._device = ranks.device
        self.images = ours.images.to(ranks.device).flatten(0, 1).float() / 255
        side = arguments["imsize"] // arguments["psize"]
        oscillators = arguments["ch"] // arguments["n"]
        self.start = torch.randn(len(self.images), oscillators, arguments["n"], side, side, device=ranks.device)

    def step_in(self, dtype: torch.dtype) -> Step:
        """The step with autocast to `dtype` (float32: none)."""

        def step(clock: Clock) -> float:
            with clock.part("forward"), torch.autocast(self._device.type, dtype, enabled=dtype != torch.float32):
                embeddings = self.model(self.images, self.start)["output"].float()
            with clock.part("loss"):
                views: Tensor = embeddings.unflatten(0, (-1, 2))
                loss = self._loss(views[:, 0], views[:, 1], self._temperature)
            with clock.part("backward"):
                loss.backward()
            with clock.part("optimizer"):
                self._optimizer.step()
                self._optimizer.zero_grad()
            return loss.item()

        return step

    def features_s(self, rounds: int) -> float:
        """Seconds per batch of one view's features, in the faster of fp32 and bf16."""
        images, start = self.images[::2], self.start[::2]
        model = _WithStart(self.model, start)
        return min(_timed_inference(model, images, rounds, precision) for precision in ("fp32", "bf16"))


class _WithStart(nn.Module):
    def __init__(self, model: nn.Module, start: Tensor) -> None:
        super().__init__()
        self.model, self.start = model, start

    def forward(self, images: Tensor) -> Any:
        return self.model(images, self.start)


def _timed_inference(model: nn.Module, images: Tensor, rounds: int, precision: str) -> float:
    times = []
    for _ in range(rounds + 1):
        clock = Clock(images.device)
        start = clock.now()
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            model(images)
        times.append(clock.now() - start)
    return statistics.median(times[1:])


def _published_arguments(backbone: Any) -> dict[str, Any]:
    """Arguments of the plain AKOrN that computes what this backbone does."""
    layers = [layer for layer in kernels.layers_of(backbone) if isinstance(layer, KuramotoLayer)]
    if not layers or not hasattr(backbone, "blocks"):
        raise UserError("--against plain knows AKOrN backbones only: set model.name to one")
    layer = layers[0]
    coupling = layer.coupling
    if not hasattr(coupling, "num_heads"):
        raise UserError("--against plain knows attention couplings only: set model.name to one")
    height, width = backbone.patch_embed.img_size
    assert height == width
    return {
        "n": layer.n, "ch": layer.dim, "L": len(layers), "T": [each.num_steps for each in layers],
        "psize": backbone.patch_embed.patch_size[0], "imsize": height, "J": "attn", "gta": coupling.grid is not None,
        "c_norm": "gn" if hasattr(layer.c_norm, "weight") else "none", "heads": coupling.num_heads,
    }  # fmt: skip
