"""DeepSpeed: ZeRO, precision and accumulation; the only module that imports it."""

from __future__ import annotations

import logging
import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unic_ds import config, optim


def build(student: nn.Module, cfg: config.Optim, settings: dict[str, Any]) -> Any:
    """A DeepSpeed engine around `student` with AdamW on its trained parameters."""
    deepspeed = load_deepspeed()
    optimizer = torch.optim.AdamW(
        optim.groups(student, cfg.weight_decay),
        lr=cfg.peak,
        betas=(cfg.beta1, cfg.beta2),
        eps=cfg.eps,
        fused=True,
    )
    linear = F.linear
    engine, *_ = deepspeed.initialize(
        model=student, optimizer=optimizer, config=settings, dist_init_required=False
    )
    if F.linear is not linear:
        confine(student, F.linear)
        F.linear = linear
    return engine


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
    """fp32 weights under `prefix` (cut off), gathered on the CPU; every rank must call it."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    state = {}
    for name, parameter in engine.module.named_parameters():
        if not name.startswith(prefix):
            continue
        full = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        if full is None:
            with GatheredParameters([parameter]):
                full = parameter.detach().clone()
        state[name.removeprefix(prefix)] = full.detach().float().cpu().clone()
    return state


def weights_on_disk(shards: Path, prefix: str) -> dict[str, Tensor]:
    """fp32 weights under `prefix` (cut off) from the ZeRO shards of a checkpoint of our own."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    state = get_fp32_state_dict_from_zero_checkpoint(str(shards.parent), tag=shards.name)
    return {k.removeprefix(prefix): v.float() for k, v in state.items() if k.startswith(prefix)}


def grad_norm(engine: Any) -> float | None:
    """The last step's gradient norm over all ranks, where DeepSpeed kept it."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)
