"""DeepSpeed: ZeRO, precision and accumulation; the only module that imports it."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unic_ds import config, optim
from unic_ds.average import KEY, AveragedAdamW, in_place_of_weights


def build(student: nn.Module, cfg: config.Optim, settings: dict[str, Any]) -> Any:
    """A DeepSpeed engine around `student` with AdamW on its trained parameters."""
    deepspeed = load_deepspeed()
    optimizer = adamw(optim.groups(student, cfg.weight_decay), cfg)
    linear = F.linear
    engine, *_ = deepspeed.initialize(
        model=student, optimizer=optimizer, config=settings, dist_init_required=False
    )
    if F.linear is not linear:
        confine(student, F.linear)
        F.linear = linear
    optimizer.state.clear()  # under ZeRO-0 in bf16 DeepSpeed took a step of zero gradients
    return engine


def adamw(groups: list[dict[str, Any]], cfg: config.Optim) -> torch.optim.AdamW:
    """AdamW, with an average of the weights where `cfg.ema` asks; its rate comes with each step."""
    options: dict[str, Any] = {
        "lr": 0.0,
        "betas": (cfg.beta1, cfg.beta2),
        "eps": cfg.eps,
        "fused": True,
    }
    if cfg.ema:
        return AveragedAdamW(groups, decay=cfg.ema, **options)
    return torch.optim.AdamW(groups, **options)


def confine(student: nn.Module, linear: Any) -> None:
    """Give the student's Linears, and nothing else of this process, the `linear` of ZeRO-3.

    DeepSpeed replaces `F.linear` for everybody by one that keeps no gathered weight. In bf16 it
    rounds before it adds the bias, so frozen teachers would give other targets than under ZeRO-2.
    """

    def forward(module: nn.Linear, x: Tensor) -> Tensor:
        return linear(x, module.weight, module.bias)

    for module in student.modules():
        if type(module) is nn.Linear:
            module.forward = partial(forward, module)  # type: ignore[method-assign]


def load_deepspeed() -> Any:
    """DeepSpeed, without its chatter, and without the C++ all-reduce it would compile on a CPU box.

    That op costs a compiler and half a minute at the first start, and serves one node only; gloo
    does the job.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that torch 2.14 renamed.
    warnings.filterwarnings("ignore", r"`torch.distributed.\w+` is deprecated", FutureWarning)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def weights(engine: Any, prefix: str) -> dict[str, Tensor]:
    """What is exported: fp32 weights under `prefix` (cut off), gathered on the CPU.

    Their average where the run keeps one. Every rank must call it.
    """
    masters = whole_masters(engine.optimizer)
    with in_place_of_weights(engine.basic_optimizer):
        return {
            name.removeprefix(prefix): gather(parameter, masters).float().cpu().clone()
            for name, parameter in engine.module.named_parameters()
            if name.startswith(prefix)
        }


def gather(parameter: nn.Parameter, masters: dict[nn.Parameter, Tensor]) -> Tensor:
    """The whole of a parameter, in fp32 where it is trained."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    full = masters.get(parameter)
    if full is None and parameter.requires_grad:
        full = safe_get_full_fp32_param(parameter)
    if full is None:
        with GatheredParameters([parameter]):
            full = parameter.detach().clone()
    return full.detach()


def whole_masters(optimizer: Any) -> dict[nn.Parameter, Tensor]:
    """Each bf16 parameter's fp32 master where every rank holds all of it: under ZeRO-0."""
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    if not isinstance(optimizer, FP16_UnfusedOptimizer):
        return {}
    pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {low: high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}


def weights_on_disk(shards: Path, prefix: str) -> dict[str, Tensor]:
    """What `weights` gives, from the ZeRO shards of a checkpoint of our own."""
    from deepspeed.utils import zero_to_fp32 as disk

    if not any(shards.glob("*_optim_states.pt")):
        raise ValueError(
            f"{str(shards)!r} was saved under ZeRO-0, whose checkpoints hold no shards to read;"
            " the training command itself exports at its end"
        )
    files = disk.get_optim_files(str(shards))
    stage, world, masters, paddings = disk.parse_optim_states(files, str(shards))
    models = disk.parse_model_states(disk.get_model_state_files(str(shards)))
    flat = [averages_on_disk(Path(f), m) for f, m in zip(files, masters, strict=True)]
    if stage == 3:
        state = disk._get_fp32_state_dict_from_zero3_checkpoint(world, flat, models, False)
    else:
        state = disk._get_fp32_state_dict_from_zero2_checkpoint(
            world, flat, models, False, paddings
        )
        # ZeRO-1 saves frozen weights with the module alone
        state = whole_module(shards) | state
    wanted = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return disk.to_torch_tensor(wanted, dtype=torch.float32)


def whole_module(shards: Path) -> dict[str, Tensor]:
    """The module's weights as ZeRO-1 and 2 save them, in the precision that it computes in."""
    file = shards / "mp_rank_00_model_states.pt"
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)["module"]


def averages_on_disk(file: Path, masters: list[Tensor]) -> list[Tensor]:
    """A rank's averages in the place of its flat fp32 `masters`; these where none are kept."""
    shard = torch.load(file, map_location="cpu", mmap=True, weights_only=False)
    saved = shard["optimizer_state_dict"]
    state = saved.get("optimizer_state_dict", saved.get("base_optimizer_state"))["state"]
    # a master is saved without its padding, the state of the same index with it
    return [
        state[i][KEY][: len(master)] if KEY in state.get(i, {}) else master
        for i, master in enumerate(masters)
    ]


def copies(engine: Any) -> int:
    """fp32 numbers that a checkpoint holds for each weight: itself, two moments, an average."""
    return 4 if isinstance(engine.basic_optimizer, AveragedAdamW) else 3


def guard(engine: Any, skip: Callable[[Tensor | float], Tensor]) -> None:
    """Let the optimiser ask before each of its steps whether to leave everything as it is.

    `skip` is told the gradient's norm over all ranks and says 1 or 0 on the device. DeepSpeed
    refuses gradients that are not finite by itself under most settings; then `skip` is not asked.
    """
    whole, inner = engine.optimizer, engine.basic_optimizer

    def ask(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        norm = own_norm(weights) if whole is inner else whole._global_grad_norm
        optimizer.found_inf = skip(norm).to(weights[0].device)  # type: ignore[attr-defined]

    # Where a part of the state is offloaded, DeepSpeed steps the rest by an AdamW of its own.
    for optimizer in filter(None, (inner, getattr(whole, "backup_optimizer", None))):
        optimizer.register_step_pre_hook(ask)


def own_norm(weights: list[Tensor]) -> Tensor:
    """The gradient's norm where DeepSpeed takes none: under ZeRO-0 in fp32."""
    return nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])


def grad_norm(engine: Any) -> Tensor | float | None:
    """The last step's gradient norm over all ranks as DeepSpeed kept it, if it did; not read."""
    return engine.get_global_grad_norm()
