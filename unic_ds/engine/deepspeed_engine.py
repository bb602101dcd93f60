"""DeepSpeed: ZeRO, precision and accumulation. Only this module and `reshard` import it."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unic_ds import config, dist
from unic_ds.config.ds_config import DeepSpeedSettings
from unic_ds.engine import optim
from unic_ds.engine.ema import AveragedAdamW, swapped_in
from unic_ds.engine.protocol import Engine

Module = TypeVar("Module", bound=nn.Module)


def partitioned(make: Callable[[], Module], settings: DeepSpeedSettings) -> Module:
    """The module that `make` makes; under ZeRO-3 it is initialised already partitioned.

    Each parameter is partitioned at the end of its module's constructor, in the precision of the
    settings; other values computed there stay in fp32, as under the other stages. Later writes to
    a parameter are made inside `gathered`.
    """
    if settings.stage < 3:
        return make()
    deepspeed = load_deepspeed()
    # Until DeepSpeed is initialised, zero.Init assumes one rank.
    backend = deepspeed.accelerator.get_accelerator().communication_backend_name()
    deepspeed.init_distributed(backend, dist_init_required=False)
    init: Any = deepspeed.zero.Init

    class PartitionedInit(init):
        def _post_init_method(self, module: nn.Module) -> None:
            if any(p.is_meta for p in module.parameters(recurse=False)):
                return  # a module on the meta device, not the student
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(self.dtype)
            super()._post_init_method(module)

    zero = settings.raw["zero_optimization"] | {"override_module_apply": False}
    changed, linear = settings.raw | {"zero_optimization": zero}, F.linear
    try:
        with PartitionedInit(config_dict_or_path=changed, tensor_overrides=[]):
            student = make()
        if F.linear is not linear:
            use_zero3_linear_in_student_only(student, F.linear)
    finally:
        F.linear = linear
    return student


@contextmanager
def gathered(parameter: nn.Parameter) -> Iterator[bool]:
    """Context manager that gathers a ZeRO-3 parameter; True on the rank whose writes are kept.

    Every rank must enter it, and gets rank 0's values. A parameter that is not partitioned is
    written by every rank.
    """
    if not hasattr(parameter, "ds_id"):
        yield True
        return
    with load_deepspeed().zero.GatheredParameters([parameter], modifier_rank=0):
        yield dist.rank() == 0


def shape(value: Tensor) -> torch.Size:
    """The full shape of a tensor, which ZeRO-3 may have partitioned."""
    return getattr(value, "ds_shape", value.shape)


def build(student: Module, cfg: config.Optim, settings: DeepSpeedSettings) -> Engine[Module]:
    """A DeepSpeed engine around `student` with AdamW on its trained parameters."""
    deepspeed = load_deepspeed()
    groups = optim.groups(student, cfg.weight_decay, layer_decay=cfg.layer_decay)
    optimizer = adamw(groups, cfg)
    linear = F.linear
    engine: Engine[Module]
    engine, *_ = deepspeed.initialize(
        model=student, optimizer=optimizer, config=settings.raw, dist_init_required=False
    )
    if F.linear is not linear:
        use_zero3_linear_in_student_only(student, F.linear)
        F.linear = linear
    optimizer.state.clear()  # under ZeRO-0 in bf16 DeepSpeed has taken a step of zero gradients
    mask_norm_on_device()
    wait_on_device(engine.optimizer, deepspeed.accelerator.get_accelerator())
    return engine


def wait_on_device(optimizer: Any, accelerator: Any) -> None:
    """Replace DeepSpeed's waits of the host for the device by waits between streams.

    After each backward DeepSpeed 0.19.8 stops the host until the gradients are reduced: ZeRO-1 and
    2 with `overlap_comm` for the whole device, ZeRO-3 for its reduction stream, and at the end of
    a step for the whole device. Kernels need that order, the host does not:

    - Accumulation, norm and AdamW are queued on the current stream, after its wait.
    - Buckets and gradients freed afterwards were allocated on the current stream, which reuses
      their memory after its wait; the allocator holds what was given to `record_stream`.
    - Memory that the reduction stream allocated is reused by that stream, after it has waited for
      the stream that fills the next bucket.
    - ZeRO-3's gathers read what AdamW wrote, so their stream waits for the current one. DeepSpeed
      leaves that to the wait for the device, which it omits if no parameter is persistent.

    Under offload the CPU reads gradients, so the host has to wait. A CPU has no streams, and an
    optimiser without these names is of another version: both stay as they are.
    """
    offloads = ("cpu_offload", "offload_optimizer", "offload_param")
    if any(getattr(optimizer, name, False) for name in offloads):
        return
    epilogue = "independent_gradient_partition_epilogue"
    if stream := getattr(optimizer, "reduction_stream", None):
        queue_waits(optimizer, epilogue, accelerator, stream)
    stream = getattr(optimizer, "reduce_and_partition_stream", None)
    offload = getattr(optimizer, "parameter_offload", None)  # ZeRO-3's hooks, offloaded or not
    gathers = getattr(offload, "_DeepSpeedZeRoOffload__allgather_stream", None)
    if stream and gathers:
        queue_waits(optimizer, epilogue, accelerator, stream)
        queue_waits(optimizer, "_post_step", accelerator, gathers)


def queue_waits(optimizer: Any, name: str, accelerator: Any, stream: Any) -> None:
    """Let the current stream and `stream` wait for each other during and after a method.

    Within the method they do so instead of `synchronize`, of the accelerator and of `stream`.
    """
    method = getattr(optimizer, name, None)
    if method is None:
        return

    def wait_mutually(*_: object) -> None:
        current = accelerator.current_stream()
        stream.wait_stream(current)  # in ZeRO-1 and 2 a bucket may be full and not reduced yet
        current.wait_stream(stream)

    def without_host_waits(*args: object) -> None:
        for owner in (accelerator, stream):
            owner.synchronize = wait_mutually
        try:
            method(*args)
            wait_mutually()
        finally:
            for owner in (accelerator, stream):
                del owner.synchronize

    setattr(optimizer, name, without_host_waits)


def mask_norm_on_device() -> None:
    """Let ZeRO-1 and 2 mark a norm that is not finite without a wait of the host.

    DeepSpeed 0.19.8 uploads the -1 that it writes there, and CUDA's `masked_fill_` reads it back:
    two waits for each parameter group in every step.
    """
    stage_1_and_2 = load_deepspeed().runtime.zero.stage_1_and_2

    def mask(norm: Tensor, device: object = None, val: float = -1.0) -> None:
        norm.masked_fill_(~norm.isfinite(), val)

    if hasattr(stage_1_and_2, "mask_nan_or_inf_with_val_inplace"):
        stage_1_and_2.mask_nan_or_inf_with_val_inplace = mask


def adamw(groups: list[dict[str, Any]], cfg: config.Optim) -> torch.optim.AdamW:
    """AdamW, with a moving average of the weights if `cfg.ema`; `optim.apply` sets its rate."""
    options: dict[str, Any] = {
        "lr": 0.0,
        "betas": (cfg.beta1, cfg.beta2),
        "eps": cfg.eps,
        "fused": True,
    }
    if cfg.ema:
        return AveragedAdamW(groups, decay=cfg.ema, **options)
    return torch.optim.AdamW(groups, **options)


def use_zero3_linear_in_student_only(student: nn.Module, linear: Callable[..., Tensor]) -> None:
    """Use the `linear` of ZeRO-3 in the student's Linears only.

    DeepSpeed replaces `F.linear` globally by one that keeps no gathered weight. In bf16 it rounds
    before it adds the bias, so frozen teachers would give other targets than under ZeRO-2.
    """

    def forward(module: nn.Linear, x: Tensor) -> Tensor:
        return linear(x, module.weight, module.bias)

    for module in student.modules():
        if type(module) is nn.Linear:
            module.forward = partial(forward, module)  # type: ignore[method-assign]


@cache
def load_deepspeed() -> ModuleType:
    """Import DeepSpeed (seconds) without its log lines and its C++ all-reduce for CPUs.

    That op needs a compiler and half a minute at the first start, and works on one node only; gloo
    is used instead.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that torch 2.14 renamed.
    warnings.filterwarnings("ignore", r"`torch.distributed.\w+` is deprecated", FutureWarning)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not torch.cuda.is_available():  # on a GPU node the table costs a probe of every op
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def weights(engine: Engine[nn.Module], prefix: str) -> dict[str, Tensor]:
    """fp32 weights for export, named without `prefix`, on the CPU of rank 0; none on other ranks.

    Their average if the run keeps one. Every rank must call it: weights are gathered one by one.
    """
    masters, found = full_masters(engine.optimizer), {}
    with swapped_in(engine.basic_optimizer):
        for name, parameter in engine.module.named_parameters():
            if name.startswith(prefix):
                full = gather(parameter, masters)
                if dist.rank() == 0:
                    found[name.removeprefix(prefix)] = full.float().cpu().clone()
                del full
    return found


@torch.no_grad()
def copy_weights(engine: Engine[nn.Module], into: nn.Module) -> None:
    """Copy the fp32 weights, or their average if the run keeps one, to an equal module.

    It has them on every rank; every rank must call it. The engine stays as it is.
    """
    masters = full_masters(engine.optimizer)
    with swapped_in(engine.basic_optimizer):
        for name, parameter in engine.module.named_parameters():
            into.get_parameter(name).copy_(gather(parameter, masters))


def gather(parameter: nn.Parameter, masters: dict[nn.Parameter, Tensor]) -> Tensor:
    """The full value of a parameter, in fp32 if it is trained."""
    deepspeed, full = load_deepspeed(), masters.get(parameter)
    if full is None and parameter.requires_grad:
        full = deepspeed.utils.safe_get_full_fp32_param(parameter)
    if full is None:
        with deepspeed.zero.GatheredParameters([parameter]):
            full = parameter.detach().clone()
    return full.detach()


def full_masters(optimizer: Any) -> dict[nn.Parameter, Tensor]:
    """Each bf16 parameter's fp32 master under ZeRO-0; empty under the stages that partition it."""
    unfused = load_deepspeed().runtime.fp16.unfused_optimizer
    if not isinstance(optimizer, unfused.FP16_UnfusedOptimizer):
        return {}
    pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {low: high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}


def param_order(engine: Engine[nn.Module]) -> list[str]:
    """Names of trained weights in the order in which ZeRO-0 saves their state without names."""
    if engine.zero_optimization_stage():
        return []
    masters = full_masters(engine.optimizer)
    names = {masters.get(p, p): name for name, p in engine.module.named_parameters()}
    return [names[p] for group in engine.basic_optimizer.param_groups for p in group["params"]]


def state_copies(engine: Engine[nn.Module]) -> int:
    """fp32 numbers that a checkpoint holds for each weight: itself, two moments, an average."""
    return 4 if isinstance(engine.basic_optimizer, AveragedAdamW) else 3


def set_found_inf(engine: Engine[nn.Module], found_inf: Callable[[Tensor | float], Tensor]) -> None:
    """Make the optimiser skip the steps for which `found_inf` returns 1 on the device, not 0.

    Its argument is the gradient's norm over all ranks. Under most settings DeepSpeed itself rejects
    gradients that are not finite, and `found_inf` is not called.
    """
    outer, inner = engine.optimizer, engine.basic_optimizer

    def set_from_guard(optimizer: torch.optim.Optimizer, *_: object) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        norm = local_grad_norm(weights) if outer is inner else outer._global_grad_norm
        optimizer.found_inf = found_inf(norm).to(weights[0].device)  # type: ignore[attr-defined]

    # If a part of the state is offloaded, DeepSpeed steps the rest by a second AdamW.
    for optimizer in filter(None, (inner, getattr(outer, "backup_optimizer", None))):
        optimizer.register_step_pre_hook(set_from_guard)


def local_grad_norm(weights: list[Tensor]) -> Tensor:
    """The gradient's norm for ZeRO-0 in fp32, under which DeepSpeed computes none."""
    return nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])


def free_memory(engine: Engine[nn.Module]) -> None:
    """Free the memory of training; the engine cannot be used again.

    ZeRO-3 makes autograd functions of the modules, which torch never frees, so references to large
    tensors are cut.
    """
    engine.destroy()
    for parameter in engine.module.parameters():
        vars(parameter).clear()  # DeepSpeed's attributes: the partition, the optimiser
        parameter.data, parameter.grad = torch.empty(0, dtype=parameter.dtype), None
    vars(engine).clear()


def grad_norm(engine: Engine[nn.Module]) -> Tensor | float | None:
    """The last step's gradient norm over all ranks, if DeepSpeed kept it; may be on the device."""
    return engine.get_global_grad_norm()
