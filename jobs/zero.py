"""The DeepSpeed engine: the one door to deepspeed, and where its stages differ from one another.

Everything above this file sees one thing: `accumulate` a loss, `step` at a rate, and the state as fragments: which
elements of which parameter this rank keeps, in place and without a collective. Where a stage keeps them is known here:

    stage 0, fp32   the parameter itself, and torch's optimizer state; every rank has all, so ranks share them out
    stage 0, bf16   fp32 copies beside the parameters (DeepSpeed's unfused optimizer); shared out likewise
    stages 1, 2     this rank's stretch of one flat fp32 buffer over all parameters
    stage 3         this rank's stretch of each parameter
"""

import fcntl
import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param, safe_get_local_optimizer_state
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig

from cluster import env
from jobs.config import OptimizerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
PARTS = ("weight", *MOMENTS)
"""What training keeps of a trained parameter, each in fp32."""


@dataclass(frozen=True)
class Fragment:
    """A run of one trained parameter's elements that this rank keeps.

    Attributes:
        name: the parameter's; start: of its flattened elements, the first one here.
        parts: by PARTS, the engine's own live tensors, flat and of one length. They change with every step.
    """

    name: str
    start: int
    parts: dict[str, Tensor]

    @property
    def count(self) -> int:
        return self.parts["weight"].numel()


class SavedState(Protocol):
    """Training state as it was saved, whoever keeps it."""

    def read(self, part: str, name: str, start: int, count: int) -> Tensor:
        """`count` elements of a trained parameter's flattened part (PARTS), from `start` on, fp32 on the host."""


def join_process_group() -> None:
    """Let DeepSpeed use the process group that torch.distributed has."""
    _load_operation()
    deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)


def _load_operation() -> None:
    """Compile DeepSpeed's CPU operation, or load it, in one process of a node at a time.

    torch's own lock is a file that outlives its owner: a worker that was killed while it compiled would leave every
    later one waiting for ever. Ours ends with its process, so a file that is found under it has no owner.
    """
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    folder = os.environ.get(env.TORCH_EXTENSIONS_DIR)
    if builder is None or not folder:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    with (Path(folder) / "luthier.lock").open("w") as ours:
        fcntl.flock(ours, fcntl.LOCK_EX)
        (Path(folder) / builder.name / "lock").unlink(missing_ok=True)
        if deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
            builder.load()


def settings(stage: int, dtype: str, clip_norm: float) -> dict[str, Any]:
    """DeepSpeed's config. The accumulation count is 1 for DeepSpeed: `accumulate` marks the boundaries itself."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Plain fp32 at stage 0 is clipped by us, because DeepSpeed would not tell the norm.
        "gradient_clipping": clip_norm if _wrapped(stage, dtype) else 0.0,
        "bf16": {"enabled": dtype == "bf16"},
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": False},
        "steps_per_print": 1 << 60,
    }


def _wrapped(stage: int, dtype: str) -> bool:
    """Whether DeepSpeed puts its own optimizer around ours."""
    return stage > 0 or dtype == "bf16"


def sharded_loading(stage: int, dtype: str) -> AbstractContextManager[object]:
    """While this context lives, from_pretrained gives each rank its shard of the weights only (stage 3)."""
    return _KeptConfig(settings(stage, dtype, 1.0)) if stage == 3 else nullcontext()


class _KeptConfig(AbstractContextManager[object]):
    """transformers holds its DeepSpeed config by a weak reference, so somebody must own it while loading."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self._kept: HfDeepSpeedConfig | None = None

    def __enter__(self) -> object:
        self._kept = HfDeepSpeedConfig(self._config)
        return self

    def __exit__(self, *_: object) -> None:
        self._kept = None


class ZeroEngine:
    """A model under training, its state sharded over the ranks of the default process group.

    Args:
        model: parameters with requires_grad are trained.
        stage: 0 to 3.
        dtype: `fp32` or `bf16`.
    """

    def __init__(self, model: nn.Module, optimizer: OptimizerConfig, stage: int, dtype: str) -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._adamw = torch.optim.AdamW(
            trained,
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
            eps=optimizer.epsilon,
            weight_decay=optimizer.weight_decay,
        )
        self._clip_norm = optimizer.clip_norm
        self._stage = stage
        self._wrapped = _wrapped(stage, dtype)
        self.engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=self._adamw,
            config=settings(stage, dtype, optimizer.clip_norm),
            dist_init_required=False,
        )
        if isinstance(self._optimizer, FP16_UnfusedOptimizer):
            # DeepSpeed makes the moments by a step on zero gradients, which would leave AdamW's count one too high.
            self._set_updates(0)
        self.device: torch.device = self.engine.device
        self.world_size: int = self.engine.dp_world_size

    @property
    def module(self) -> nn.Module:
        """The model; under stage 3 its parameters are shards outside of a forward pass."""
        module: nn.Module = self.engine.module
        return module

    def accumulate(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of one micro-batch.

        Args:
            loss: this rank's share of the step's loss: the step's loss is the SUM over ranks and micro-batches.
            last: whether it is this rank's last micro-batch of the step (all ranks agree).
        """
        self.engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over ranks; the product makes it the sum.
        self.engine.backward(loss * self.world_size, scale_wrt_gas=False)
        if not last:
            self.engine.step()

    def step(self, learning_rate: float) -> float:
        """Clip, update, forget the gradients. Returns the gradient's global norm before clipping.

        When that is not finite nothing is updated, on any rank.
        """
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        if self._wrapped:
            self.engine.step()
            return math.inf if self._optimizer.overflow else float(self.engine.get_global_grad_norm())
        trained = [parameter for group in self._adamw.param_groups for parameter in group["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(trained, self._clip_norm))
        if not math.isfinite(norm):
            self._adamw.zero_grad()  # without gradients the step changes nothing
        self.engine.step()
        return norm

    def held_bytes(self) -> int:
        """Memory that this worker holds: of its GPU (all that is not free there), else resident, by the kernel's word.

        Between steps it is near the peak: neither CUDA's allocator nor a CPU worker's heap gives back what is freed.
        """
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            return total - free
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Trained parameters by name, in an order that all ranks share."""
        return ((name, parameter) for name, parameter in self.module.named_parameters() if parameter.requires_grad)

    def whole(self, parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
        """Inside, these parameters are whole on every rank. A collective under stage 3."""
        context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(parameters, enabled=self._stage == 3)
        return context

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """The fp32 weight of a trained parameter, whole, on the host. A collective from stage 1 on."""
        return self._weight(parameter).detach().to("cpu", torch.float32, copy=True)

    def _weight(self, parameter: nn.Parameter) -> Tensor:
        if self._stage:
            return _present(safe_get_full_fp32_param(parameter))
        return self._master(parameter)

    def _master(self, parameter: nn.Parameter) -> Tensor:
        """Stage 0: the fp32 tensor that AdamW updates."""
        if not isinstance(self._optimizer, FP16_UnfusedOptimizer):
            return parameter
        for held, masters in zip(self._optimizer.fp16_groups, self._optimizer.fp32_groups, strict=True):
            for low, master in zip(held, masters, strict=True):
                if low is parameter:
                    return torch.as_tensor(master)
        raise AssertionError("a trained parameter has no fp32 copy")

    def fragments(self) -> list[Fragment]:
        """This rank's share of the training state: over all ranks, each element is in one fragment.

        No collective. The optimizer must hold moments, which it does from its first step on.
        """
        if not self._stage:
            return list(self._shared_out())
        found = (self._fragment(name, parameter) for name, parameter in self.trained())
        return [fragment for fragment in found if fragment and fragment.count]

    def _shared_out(self) -> Iterator[Fragment]:
        """Stage 0: whole parameters, each to the rank that has the fewest elements so far."""
        loads = [0] * self.world_size
        for name, parameter in self.trained():
            owner = loads.index(min(loads))
            loads[owner] += parameter.numel()
            if owner == dist.get_rank():
                yield self._fragment_here(name, parameter)

    def _fragment_here(self, name: str, parameter: nn.Parameter) -> Fragment:
        master = self._master(parameter)
        held = {"weight": master.detach(), **{moment: self._adamw.state[master][moment] for moment in MOMENTS}}
        return Fragment(name, 0, {part: tensor.view(-1) for part, tensor in held.items()})

    def _fragment(self, name: str, parameter: Any) -> Fragment | None:
        """Stages 1 to 3: what of a parameter lies on this rank; DeepSpeed notes it on the parameter itself."""
        if self._stage == 3:
            held = {moment: _present(safe_get_local_optimizer_state(parameter, moment)) for moment in MOMENTS}
            held["weight"] = _present(safe_get_local_fp32_param(parameter))
            start = dist.get_rank() * held["weight"].numel()
            count = max(0, min(held["weight"].numel(), parameter.ds_numel - start))  # the last one is padded
        elif parameter._hp_mapping is None:
            return None
        else:
            mapping = parameter._hp_mapping
            held = {moment: mapping.get_hp_fragment(moment) for moment in MOMENTS}
            held["weight"] = mapping.get_hp_fragment()
            start, count = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        return Fragment(name, start, {part: held[part].detach().view(-1)[:count] for part in PARTS})

    def updates(self) -> int:
        """How many updates AdamW has made: its bias correction depends on it."""
        return int(next(iter(self._adamw.state.values()))["step"])

    def restore_moments(self, saved: SavedState, updates: int) -> None:
        """Put back AdamW's moments and count. The weights must have been put back before this engine was made.

        The optimizer must already hold (any) moments: take one step at rate 0 first.
        """
        # At stage 0 every rank keeps every parameter; what it would save of them is not all it must restore.
        everything = (self._fragment_here(name, parameter) for name, parameter in self.trained())
        for fragment in self.fragments() if self._stage else everything:
            for moment in MOMENTS:
                value = saved.read(moment, fragment.name, fragment.start, fragment.count)
                fragment.parts[moment].copy_(value)
        self._set_updates(updates)

    def _set_updates(self, updates: int) -> None:
        for state in self._adamw.state.values():
            state["step"] = torch.full_like(torch.as_tensor(state["step"]), updates)


def trained_elements(model: nn.Module) -> dict[str, int]:
    """How many elements each trained parameter has, by name, also where only shards of it are here."""
    return {
        name: int(getattr(parameter, "ds_numel", parameter.numel()))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def put_weights(model: nn.Module, saved: SavedState, stage: int) -> None:
    """Set the trained weights of a model that no engine holds yet; shards (stage 3) take their part."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=stage == 3), torch.no_grad():
                if parameter.numel():
                    parameter.copy_(saved.read("weight", name, 0, parameter.numel()).view(parameter.shape))


def _present(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise AssertionError("DeepSpeed holds no state for a trained parameter")
    return tensor
