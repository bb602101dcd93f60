"""Parameter groups, and schedules as pure functions of the step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from unic_ds import config

if TYPE_CHECKING:
    from torch import nn


def warmup_cosine(i: int, *, steps: int, peak: float, end: float, warmup: int = 0) -> float:
    """Linear from 0 to `peak` over `warmup` steps, then a cosine to `end`; `i` counts from 0."""
    if i < warmup:
        return peak * i / max(warmup - 1, 1)
    progress = (i - warmup) / max(steps - warmup, 1)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * progress))


def learning_rate(step: int, cfg: config.Optim, images: int) -> float:
    """The rate of optimiser step `step` (from 1) over `images` training images."""
    return warmup_cosine(
        step - 1,
        steps=cfg.step_count(images),
        peak=cfg.peak,
        end=min(cfg.lr_end, cfg.peak),
        warmup=cfg.warmup_steps(images),
    )


def momentum(step: int, cfg: config.Standardise, steps: int) -> float:
    """How far the targets' statistics move at step `step` (from 1); 0 once they are frozen.

    Statistics that will be frozen settle over the steps before: the same cosine, run over those.
    """
    if cfg.freeze_after and step > cfg.freeze_after:
        return 0.0
    horizon = min(cfg.freeze_after or steps, steps)
    return warmup_cosine(step - 1, steps=horizon, peak=1.0, end=cfg.momentum_end)


def groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters in two groups: decayed, and (biases and 1-D tensors) not; timm's rule."""
    from timm.optim import param_groups_weight_decay

    return [g for g in param_groups_weight_decay(module, weight_decay) if g["params"]]


def apply(optimizer: Any, rate: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
