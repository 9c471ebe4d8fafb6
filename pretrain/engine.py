"""The DeepSpeed engine around a task: forward, backward, update, at ZeRO stages 0 to 3, without its noise.

Owns: everything that touches DeepSpeed. Parameters and moments go in and come out by parameter name, as whole fp32
tensors, whatever the stage. Gradients are averaged over the ranks by DeepSpeed (always; callers scale for it).

Non-finite gradients skip the update on all ranks alike: at stage 0 on the device, without a synchronisation; above it
DeepSpeed reads the gradient norm on the host at each step and skips by itself.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.optim import make_optimizer
from pretrain.quiet import quiet

if TYPE_CHECKING:
    from configs.schema import Compute, Optimizer
    from pretrain.data.batch import Batch
    from pretrain.distributed import Ranks
    from pretrain.tasks import Task

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
# Gradients that ZeRO reduces together: 64 MiB, two buffers. DeepSpeed's own size would take 4 GB whatever the model's.
BUCKET_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class StepResult:
    """What one update did; tensors on the device, read only when logged."""

    grad_norm: Tensor  # of the whole gradient before clipping, fp32 scalar
    skipped: Tensor  # 1.0 where the gradient was not finite and nothing was updated
    norms: dict[str, Tensor] | None = None  # by parameter; stage 0 only


@dataclass(frozen=True)
class Moments:
    """State of the optimizer by `<parameter>.<moment>`, whole tensors, and its count of applied updates."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0


def deepspeed_config(compute: Compute, optimizer: Optimizer, world_size: int, device_type: str) -> dict[str, Any]:
    """Return DeepSpeed's configuration. The batch sizes in it are placeholders: DeepSpeed never sees the data."""
    config: dict[str, Any] = {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device at each forward and each step
        # DeepSpeed's default is to clip at 1. Stage 0 clips in its own step.
        "gradient_clipping": optimizer.clip if compute.zero_stage > 0 and optimizer.clip else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": compute.zero_stage,
            "overlap_comm": device_type == "cuda",
            "reduce_bucket_size": BUCKET_ELEMENTS,
        },
        # Gradients travel in fp32: no module is listed as safe to reduce in bf16.
        "torch_autocast": {
            "enabled": compute.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
    }
    return config


class _Embedder(nn.Module):
    """The root that DeepSpeed sees: its forward is the task's `embed`."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.module = task.module
        self._embed = task.embed

    def forward(self, batch: Batch) -> Tensor:
        return self._embed(batch)


class Engine:
    """Training state of a task on this rank. Construction, `step` and the methods so marked are collective."""

    def __init__(
        self, task: Task, compute: Compute, optimizer: Optimizer, ranks: Ranks, moments: Moments | None
    ) -> None:
        self.stage, self.ranks, self.module = compute.zero_stage, ranks, task.module
        self._clip = optimizer.clip
        self._names = {name: p for name, p in task.module.named_parameters() if p.requires_grad}
        config = deepspeed_config(compute, optimizer, ranks.world_size, ranks.device.type)
        self._inner = make_optimizer(task.module, optimizer)
        with quiet():
            self._deepspeed = _initialize(_Embedder(task), self._inner, config)
            if moments is not None and moments.tensors:
                self._load_moments(moments)

    def embed(self, batch: Batch) -> Tensor:
        """Outputs [b, ...] of a part of this rank's batch; collective at stage 3."""
        return self._deepspeed(batch)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradients of a scalar; the last call of a step averages them over the ranks (collective).

        A loss that is not finite gets gradients that are not finite either, so that all ranks skip the step.
        """
        self._deepspeed.set_gradient_accumulation_boundary(last)
        poison = torch.where(loss.isfinite(), 1.0, torch.nan).to(loss)
        self._deepspeed.backward(loss * poison.detach())

    def step(self, learning_rate: float) -> StepResult:
        """Clip, update and clear the gradients (collective above stage 0)."""
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.stage == 0:
            return self._step_plain()
        self._deepspeed.step()
        # A number where the update was skipped, else a tensor.
        norm = torch.as_tensor(self._deepspeed.get_global_grad_norm(), dtype=torch.float32, device=self.ranks.device)
        return StepResult(norm, norm.new_tensor(float(self._deepspeed.optimizer.overflow)))

    def _step_plain(self) -> StepResult:
        used = {name: p.grad for name, p in self._names.items() if p.grad is not None}
        norms = torch.stack(torch._foreach_norm(list(used.values())))
        norm = torch.linalg.vector_norm(norms)
        bad = (~norm.isfinite()).float()
        self._inner.found_inf = bad  # type: ignore[attr-defined]
        if self._clip is not None:
            self._inner.grad_scale = (norm / self._clip).clamp(min=1.0)  # type: ignore[attr-defined]
        self._deepspeed.step()
        return StepResult(norm, bad, dict(zip(used, norms.unbind())))

    def weights(self) -> dict[str, Tensor]:
        """Whole fp32 parameters and buffers by name, on this device (collective at stage 3)."""
        if self.stage < 3:
            return {name: tensor.detach() for name, tensor in self.module.state_dict().items()}
        frozen = [p for p in self.module.parameters() if not p.requires_grad]
        with _whole(frozen, self.stage):
            state = {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()}
        return state | self.assemble(self.shards())

    def shards(self) -> dict[str, Tensor]:
        """What this rank holds of each trained parameter: all of it below stage 3, a flat part of it there."""
        if self.stage < 3:
            return {name: p.detach() for name, p in self._names.items()}
        from deepspeed.utils import safe_get_local_fp32_param

        return {name: safe_get_local_fp32_param(p).detach() for name, p in self._names.items()}

    def assemble(self, shards: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors from what the ranks hold (collective at stage 3)."""
        if self.stage < 3:
            return shards
        return {name: self._gather(shard, self._names[name]) for name, shard in shards.items()}

    def _gather(self, shard: Tensor, parameter: Any) -> Tensor:
        whole = shard.new_empty(self.ranks.world_size * shard.numel())
        dist.all_gather_single(whole, shard.contiguous())
        return whole[: parameter.ds_numel].view(parameter.ds_shape)

    def shard(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor shaped like the parameter of that name; the inverse of `assemble`."""
        if self.stage < 3:
            return whole
        size = self.shards()[name].numel()
        padded = whole.new_zeros(self.ranks.world_size * size)
        padded[: whole.numel()] = whole.flatten()
        return padded.chunk(self.ranks.world_size)[self.ranks.rank].clone()

    def moments(self) -> Moments:
        """The optimizer's state as whole tensors (collective above stage 0); empty before the first update."""
        if self.stage == 0:
            states = {name: self._inner.state.get(p, {}) for name, p in self._names.items()}
            tensors = {f"{n}.{key}": t for n, s in states.items() for key, t in s.items() if key != "step"}
            return Moments(tensors, self._updates(states.values()))
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = self._updates(self._inner.state.values())
        if steps == 0:
            return Moments()
        self._link_moments()
        pairs = [(name, p, key) for name, p in self._names.items() for key in ADAM_MOMENTS]
        return Moments({f"{name}.{key}": safe_get_full_optimizer_state(p, key) for name, p, key in pairs}, steps)

    def _link_moments(self) -> None:
        """Stages 1 and 2 link parameters to moments after the first group's first step, before the others have any."""
        if self.stage in (1, 2):
            self._deepspeed.optimizer._hp_optimizer_states_linked = False
            self._deepspeed.optimizer._lazy_init_hp_params_optimizer_state()

    @staticmethod
    def _updates(states: Any) -> int:
        counts = [int(s["step"]) for s in states if "step" in s]  # device sync; only when saving
        return max(counts, default=0)

    def _load_moments(self, moments: Moments) -> None:
        self._create_moments()
        if self.stage == 0:
            for name, p in self._names.items():
                for key, value in self._inner.state[p].items():
                    if f"{name}.{key}" in moments.tensors:  # not there: a parameter that no step has used so far
                        value.copy_(moments.tensors[f"{name}.{key}"])
        else:
            from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

            self._link_moments()
            for name, p in self._names.items():
                for key in ADAM_MOMENTS:
                    if f"{name}.{key}" in moments.tensors:
                        value = moments.tensors[f"{name}.{key}"].to(self.ranks.device)
                        if self.stage == 3:  # there the other fails for a size that the ranks do not divide
                            safe_set_local_optimizer_state(p, self.shard(name, value), key)
                        else:
                            safe_set_full_optimizer_state(p, value, key)
        for state in self._inner.state.values():
            if "step" in state:
                state["step"].fill_(float(moments.step))

    def _create_moments(self) -> None:
        """Make the optimizer allocate its state: an update with zero gradients at learning rate 0 changes nothing."""
        parameters = list(self._names.values())
        with _whole(parameters, self.stage):
            self.backward(torch.stack([(p * 0.0).sum() for p in parameters]).sum(), last=True)
        self.step(0.0)


def _whole(parameters: list[Any], stage: int) -> contextlib.AbstractContextManager[None]:
    """Parameters of stage 3 are in parts outside the forward pass; inside this they are whole (collective)."""
    if stage < 3:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def _initialize(module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    """Return DeepSpeed's engine; importing it takes seconds."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # On the CPU DeepSpeed would compile a shared-memory collective at the first start: half a minute, and an exception
    # where there is no compiler. gloo does without. Nothing of DeepSpeed's C++ is used here: it need not try a compiler
    # to find out what it could have.
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)[0]
